"""The cases of `epd-ray bench`: each measures a part of the system, or what it draws, against something in the same
run, and returns a `Record`."""
