"""What a run will need, computed before it runs: `memory` of a rank, by part, and of how many layers one is
recomputed for that; `checkpoints` on the disk. A rehearsal tells it, a run decides by it. `room` is what a
rank may use, and has used: measured, on its device.
"""
