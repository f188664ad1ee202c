"""The tokens of a task on disk, written once and then mapped into memory.

`build` tokenises, `writer` writes the columns, `blocks` checks them against their checksums; `store` opens
them, and has damaged ones made anew; `fingerprint` tells by content whether a file is the one tokenised.
"""
