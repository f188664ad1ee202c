"""A loss, a data format and a tracker for mft, in a package of their own."""
