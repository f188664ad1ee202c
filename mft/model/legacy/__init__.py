"""Checkpoints in the formats of 2023, which shipped their own code: ChatGLM 2 and 3, CodeGeeX 2, Qwen,
Baichuan, Aquila 2.

Their code is never run. `original` is such a checkpoint: checked by its config.json, which `families` and
`baichuan` translate, refusing what has no native counterpart. When it is first used, `convert` writes a
native folder into the cache: weights renamed and split as `layout` says, the vocabulary made a fast tokenizer
by `vocabulary`. Everything else in mft sees that folder alone.

`native` holds the classes that transformers lacks: the decoder with ALiBi of Baichuan-13B, and the
normalising output layer of Baichuan 2. `pickled` turns pickled weights into safetensors, for any model.
"""
