"""Models: from `model.path` to a module that returns the loss of every token, and back to a folder.

1. `causal_lm` is a family, one yaml of conf/model: where it comes from (`checkpoint_source`), its checks
   before anything loads (`model_folder`, `safetensors_header`, `quantised_checkpoint`, `meta_model`), its
   tokenizer (`special_tokens`), and its model (`loading`, `weights`, `attention_kernel`).
2. `peft/` decides what is trained: everything, adapters, or adapters beside a quantised base.
3. `token_loss` wraps the model for training: samples packed into a row do not see each other (`attention`,
   which is told of them by a `packed_row`; `fast_attention` takes the machine's kernel), the head runs in
   chunks on the positions that carry loss (`cross_entropy`), experts stay busy (`router_loss`).
4. `save` and `export` write what was trained as transformers and peft load it, with its base in mft.json
   (`origin`); `merge` and `generate` read it back.

`legacy/` converts checkpoints in the formats of 2023 into native folders; `tiny` makes a random model for
tests and dry runs. Only `transformers_private`, `peft_private` and `torch_private` use non-public parts of
libraries. Modules that only check import neither torch nor transformers.
"""
