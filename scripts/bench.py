import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama2_chat.benchmark.bench import main

if __name__ == "__main__":
    main()
