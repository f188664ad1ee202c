"""The tokens of a task on disk, written once and then mapped into memory.

`build` tokenises, `writer` writes the columns, `blocks` their checksums; `store` opens them, and makes them
anew where they are damaged; `fingerprint` tells by content whether a file is the one that was tokenised.
"""
