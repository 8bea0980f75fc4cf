"""Models: from files to logits, or to vectors.

files.py          reading files: errors, JSON, blocks at an offset
safetensors.py    the safetensors container          gguf.py             the GGUF container
spec.py           ModelSpec: what kind of decoder    rope.py             rotary embedding: parameters to table
weights.py        stream of (name, tensor)           layers.py           attention and MLP of a layer
decoder.py        the one decoder                    identity.py         fingerprint of a model for the plan
tokenizer.py      text <-> ids                       gguf_tokenizer.py   the same from GGUF metadata
chat.py           chat templates in a sandbox         pool_spec.py       what a task makes of a text but more text
labels.py         classes of a classification head    peft_files.py      what an adapter's files hold
lora.py           adapters beside the weights         encoder.py         BERT and its like (encoder_spec.py)
latent.py         DeepSeek's attention (latent_spec)  modernbert.py      that encoder (modernbert_spec.py)
mxfp4.py          GPT-OSS's experts to values         sentence_modules.py  folders of sentence-transformers
dense.py          layers behind pooling

Only weights.py, mxfp4.py, lora.py, layers.py, latent.py, decoder.py, encoder.py and modernbert.py need torch.
"""
