"""Pages and tables for people: HTML templates in one style, drawings of a run, terminal figures, and a web server."""
