"""An adapter in its base's weights: the same logits, or nothing is written; nothing trained that cannot be uploaded."""

import re
from dataclasses import replace

import pytest
import torch

from llama2_chat.errors import ChatError
from llama2_chat.loading import load
from llama2_chat.loading.choose import choose, fetch
from llama2_chat.settings import Settings
from llama2_chat.training import merging
from llama2_chat.training.base_model import fetch_base, fetch_checkpoint
from llama2_chat.training.run_json import read_run
from tests.support.serving import ignore
from tests.support.training import arguments, train_here

# TRL 1.16 and PEFT 0.21 use names that transformers 5.23 has deprecated.


def test_without_an_account_to_upload_to_nothing_is_trained(hub):
    with pytest.raises(ChatError, match="HF_TOKEN"):
        merging.create_repo("someone/finetuned")


@pytest.mark.slow
def test_a_merged_model_gives_the_adapters_logits_and_one_that_does_not_is_not_written(
    chat_model, dataset, tmp_path, monkeypatch, capsys
):
    run, again = tmp_path / "run", tmp_path / "again"
    train_here(*arguments(chat_model, dataset, run, "--use_peft", "--merge_to", tmp_path / "merged"))
    train_here(*arguments(chat_model, dataset, run, "--use_peft", "--resume", "--merge_to", again))  # it is done
    assert read_run(run).merged_to == str(again)
    modes = {file.stat().st_mode for folder in (run, again) for file in folder.iterdir() if file.is_file()}
    assert len(modes) == 1  # no weights that only their owner may read
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "merged" / "model.safetensors").read_bytes()
    said = capsys.readouterr().out
    merged = load.load_base(fetch_checkpoint(str(tmp_path / "merged")), "float32", "cpu", ignore)
    adapter = fetch(choose(Settings(model_id=str(run))), ignore)
    served = load.load(replace(adapter, quantization="float32"), ignore)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(merged(ids).logits, served.model(ids).logits, atol=0.02, rtol=0.02)  # bfloat16 on disk
    found = re.findall(
        r"differ from the adapter's by (\S+) at most in float32, and by (\S+) as written in bfloat16", said
    )
    moved = (merged(ids).logits - served.model(ids).logits).abs().max()
    assert float(found[0][0]) < 1e-5 < float(found[0][1]) < 10 * moved
    for tolerance, sentence in (
        ("LOGIT_TOLERANCE", "The merged model"),
        ("WRITTEN_TOLERANCE", "Read back in bfloat16"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(merging, tolerance, -1.0)
            with pytest.raises(ChatError, match=f"{sentence}.*it was not written"):
                merging.merge(fetch_base(str(chat_model)), run, tmp_path / "other", [[1, 2, 3]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "merged", "run"]
