"""How fast and how large: what scripts/bench.py measures. A measurement yields rows, by the names they are shown under.

local_model    the model that is measured, loaded in this process, and what a benchmark must know of its inside
load_test      many users at once, a long prompt among them, a conversation that goes on
adapter_cost   what four adapters cost eight users of the embedded model
decode_speed   one user's tokens/s, beside transformers' generate() on the same weights
embedded       everything about the embedded model: start, turns, speed, perplexity
shapes         everything about a shape of Llama 2 with random weights
starts         which shapes and precisions start in how much GPU memory
server_load    the load test for any OpenAI-compatible server
serving_cost   what the page and the API take from many users
browser_cost   what the page takes from a browser
soak           a server for minutes: healthy_readers who come and go, hostile_readers, and what is left behind
training_cost  QLoRA by sft_trainer.py, beside TRL called directly
acceptance     which precision a model should have on the GPU at hand
format_quality what int8, int4 and NF4 cost a small model that is trained in full precision first
plot           tokens/s and waiting against how many users

scripts/bench.py runs where only requirements.txt is installed: whatever else a measurement needs, it imports itself.
"""

from collections.abc import Mapping

from llama2_chat.process import share_cores

share_cores()  # as app.py's model does, before PyTorch is imported

Figures = Mapping[str, object]  # rows
