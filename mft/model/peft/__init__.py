"""Which weights of a model are trained, and how.

`full` trains every parameter and is the contract of a mode: how the base is loaded (dtype, quantisation),
what is attached, and what is checked before anything loads. `lora` attaches adapters to a frozen base,
`qlora` to a base that bitsandbytes holds in 4 or 8 bits; each brings its own checks.

`fused` computes a linear layer and its adapter as one function; `targets` finds where adapters may sit,
experts and routers included; `init` keeps how they were initialised, since PiSSA and OLoRA take a part out of
the base that must be given back on saving; `summary` counts what is trained.
"""
