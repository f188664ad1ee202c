"""What a run will need, computed before it runs. A rehearsal reports it, a run decides by it.

`rank` says what one rank needs of memory, by part: a step of a short model of fake tensors is watched
(`mft.model.step_trace`), put together to that of the whole model (`step`), and what engines hold, gather and
exchange of its weights (`sizes`) is added (`engines`). `memory` has what is
counted on of a device, and the sizes of weights and states; `checkpoints` what goes to the disk. `room` is
what a rank may use, and has used: measured, on its device.
"""
