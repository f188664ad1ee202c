"""What the project writes to disk and reads back: atomic writes, JSON that is not trusted, folders with
checksums."""
