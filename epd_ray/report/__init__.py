"""Pages and tables for people: HTML templates in one style, the drawings of a run, and figures on the terminal."""
