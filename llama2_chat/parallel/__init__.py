"""One model over several GPUs, a process for each: started, joined and ended together.

The main process is the first rank: it has the engine, and each step that it computes, the others compute on their parts
(engine/ranks.py). What a part is loading/parts.py says. The others end when the main process does, however it ends;
and when one of them ends, nothing can be computed any more.
"""

from llama2_chat.parallel.joining import RunnerOptions
from llama2_chat.parallel.processes import Workers

__all__ = ["RunnerOptions", "Workers"]
