"""A head for guesses: its data, its training, its file, and that the engine makes of it what training did."""

import copy
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path

import pytest
import torch

from llama2_chat.engine.drafts import Drafts
from llama2_chat.engine.paged_attention import attention_windows
from llama2_chat.errors import ChatError
from llama2_chat.kernels.int8 import Int8Linear
from llama2_chat.loading.disk import Files
from llama2_chat.loading.draft import read_head
from llama2_chat.training import draft_data, draft_run, draft_writer
from llama2_chat.training.base_model import fetch_base
from llama2_chat.training.draft_acceptance import acceptance
from llama2_chat.training.draft_data import Answer, Writer, make_answers, read_answers, save_answers
from llama2_chat.training.draft_engine import EngineDesk
from llama2_chat.training.draft_files import save_head
from llama2_chat.training.draft_options import HELP, DraftOptions
from llama2_chat.training.draft_training import Training, make_batches, new_head, share_that_it_says, unrolled
from llama2_chat.training.draft_writer import Asked, Desk
from llama2_chat.types import SamplingParams
from scripts.train_draft import read_arguments
from tests.support.drafts import guess_always, random_head, random_model
from tests.support.engines import GREEDY, answer, running
from tests.support.small_model import untrained
from tests.support.small_tokenizer import chatml

PARAMS = SamplingParams(repetition_penalty=1)
WRITER = Writer("a model", "a1b2c3")
SHORT = DraftOptions(epochs=3, batch_tokens=24, max_length=20, guesses=2)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def model():
    return random_model(50, seed=0, num_hidden_layers=2, initializer_range=0.3)


@pytest.mark.parametrize("by", ["rows", "the engine"])
def test_a_model_asks_itself_as_its_users_do_and_asks_again_after_its_answers(by, monkeypatch):
    monkeypatch.setattr(draft_data, "QUESTION", replace(draft_data.QUESTION, max_new_tokens=9))
    tokenizer = chatml()
    model = untrained(tokenizer, 2048).model
    attention_windows(model)
    params = SamplingParams(max_new_tokens=6)

    def written():
        if by == "rows":
            return [*make_answers(tokenizer, Desk(model, 5, 320, 9, {0}), 8, params)]
        with running(model, stop_ids={0}) as engine:
            return [*make_answers(tokenizer, EngineDesk(engine, 320), 8, params)]

    answers = written()
    assert sorted(each.ids for each in answers) == sorted(each.ids for each in written())
    assert 6 <= len(answers) <= 8  # some questions are nothing but spaces
    prompts = [tokenizer.decode(answer.ids[: answer.prompt_tokens]) for answer in answers]
    turns = [prompt.count("<|im_start|>user") for prompt in prompts]
    assert set(turns) == {1, 2}
    assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in prompts)
    assert {answer.params.temperature for answer in answers} == {0, params.temperature}


def write(model, prompts, params, stop_ids, at_once):
    """What follows each of these prompts, up to one of stop_ids."""
    columns = max(len(prompt) + each.max_new_tokens for prompt, each in zip(prompts, params, strict=True))
    desk = Desk(model, min(at_once, len(prompts)), columns, max(each.max_new_tokens for each in params), stop_ids)
    return [ids for _, ids in sorted(desk.answers(map(Asked, range(len(prompts)), prompts, params)))]


@pytest.mark.parametrize("at_once", [9, 4, 1])
@pytest.mark.parametrize("top_k", [50, 0])
def test_answers_written_side_by_side_are_those_of_the_engine(model, top_k, at_once, monkeypatch):
    monkeypatch.setattr(draft_writer, "LOOK_EVERY", 3)
    prompts = [[n, 9, *range(n)] for n in range(9)]
    params = [
        SamplingParams(max_new_tokens=20 + n, seed=n, top_k=top_k, temperature=0 if n % 3 == 0 else 1) for n in range(9)
    ]
    with running(model, speculate=False) as engine:
        said = [answer(engine, *each)[0] for each in zip(prompts, params, strict=True)]
    stop_ids = {ids[10] for ids in said[:7]}
    assert write(model, prompts, params, stop_ids, at_once) == [
        [*takewhile(lambda id: id not in stop_ids, ids)] for ids in said
    ]


def test_answers_written_by_the_engine_are_those_written_side_by_side(model):
    asked = [
        Asked(n, [n, 9, *range(n)], SamplingParams(max_new_tokens=10 + n, seed=n, temperature=n % 3)) for n in range(30)
    ]
    stop_ids, columns = {7, 30}, 64
    with running(model, stop_ids=stop_ids, max_batch=4, queue_limit=8) as engine:
        by_engine, later = EngineDesk(engine, columns), asked[20:]
        found = []
        for answered in by_engine.answers(asked[:20]):
            found.append(answered)
            if later:
                by_engine.ask(later.pop())
        assert not engine.occupancy.running
    assert sorted(found) == sorted(Desk(model, 4, columns, 39, stop_ids).answers(asked))


SCRIPT = r"""
import sys, torch
from contextlib import nullcontext
sys.path.insert(0, {root!r})
torch.cuda.device_of = lambda _: nullcontext()
from llama2_chat.engine.paged_attention import Scoring
from llama2_chat.kernels.attention import decode_attention
from llama2_chat.training.draft_writer import NextTokens

torch.manual_seed(0)
at, layer = torch.tensor([0, 70, 127]), [torch.randn(3, 128, 2, 16) for _ in "kv"]
query, key, value = (torch.randn(3, 1, heads, 16).transpose(1, 2) for heads in (6, 2, 2))
found = []
for kernel in (None, decode_attention):
    own = [states.clone() for states in layer]
    mixed = NextTokens([own], at, 128, kernel).attend(0, query, key, value, Scoring(0.3))
    found.append([mixed, *own])
for plain, others in zip(*found, strict=True):
    torch.testing.assert_close(plain, others)
print("equal")
"""


@pytest.mark.slow
def test_rows_side_by_side_attend_by_the_kernel_as_they_do_without():
    pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA, or by itself")
    script = SCRIPT.format(root=str(Path(__file__).parents[2]))
    env = os.environ | {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=env)
    assert ran.stdout == "equal\n", ran.stderr


def test_training_teaches_a_head_what_the_model_says(model):
    with running(model, speculate=False) as engine:
        answers = []
        for n in range(6):
            said, _ = answer(engine, [n, 9], GREEDY)
            answers.append(Answer([n, 9, *said], 2, GREEDY))
    options = DraftOptions(epochs=30, learning_rate=1e-2, batch_tokens=200, max_length=40, guesses=3)
    head = new_head(model, answers, 0)
    before = acceptance(model, head, answers, 3, 40)
    losses = [loss for _, loss, _ in Training(model, head, make_batches(model, head, answers, options), options).run()]
    after = acceptance(model, head, answers, 3, 40)
    assert losses[-1] < losses[0]
    assert after[0] > before[0] + 0.2
    assert after[0] <= after[1] <= after[2]


def test_training_that_was_cut_off_goes_on_as_if_it_had_not_been(model, tmp_path):
    answers = [Answer([n, *range(n, n + 9)], 2, PARAMS) for n in range(6)]
    options, heads = SHORT, []
    batches = make_batches(model, new_head(model, answers, 0), answers, options)
    for cut_off in (False, True):
        torch.manual_seed(0)
        training = Training(model, new_head(model, answers, 0), batches, options)
        if cut_off:
            for _ in islice(training.run(), 4):
                pass
            training.save(tmp_path / "training.pt")
            training = Training(model, new_head(model, answers, 0), batches, options)
            training.go_on(tmp_path / "training.pt")
        assert [step for step, _, _ in training.run()][-1] == training.total
        heads.append(training.head.state_dict())
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    other = Training(model, new_head(model, answers, 0), batches, replace(options, learning_rate=0.1))
    with pytest.raises(ChatError, match="half trained"):
        other.go_on(tmp_path / "training.pt")


def test_a_head_says_the_tokens_that_are_most_frequent_in_the_answers(model):
    answers = [Answer([1, 2, 3, 7, 7, 7, 9, 9, 4], 3, PARAMS)]
    head = new_head(model, answers, 2)
    assert head.ids.tolist() == [7, 9]
    assert share_that_it_says(head, answers) == pytest.approx(5 / 6)


def test_answers_are_saved_and_read(tmp_path):
    answers = [
        Answer([70_000, 2, 3], 1, SamplingParams(seed=3)),
        Answer([4, 5], 1, SamplingParams(seed=4, temperature=0)),
    ]
    save_answers(answers, WRITER, tmp_path / "answers.npz")
    assert read_answers(tmp_path / "answers.npz", SamplingParams(), WRITER) == answers


def test_answers_of_another_model_are_refused_and_both_are_named(tmp_path):
    save_answers([Answer([4, 5], 1, PARAMS)], WRITER, tmp_path / "answers.npz")
    with pytest.raises(ChatError, match=r"a model \(a1b2c3\), and not its second version \(d4e5f6\)"):
        read_answers(tmp_path / "answers.npz", PARAMS, Writer("its second version", "d4e5f6"))


def test_a_writer_is_known_by_its_files_whatever_their_folder_is_called(chat_model, tmp_path):
    copied = shutil.copytree(chat_model, tmp_path / "copy")
    first, again = (Writer.of(fetch_base(str(folder))) for folder in (chat_model, copied))
    assert (again.name, again.fingerprint) == (str(copied), first.fingerprint)


@pytest.mark.parametrize("kept", [0, 9, 1000, -30])
def test_a_half_trained_head_whose_file_is_damaged_is_said_to_be(model, tmp_path, kept):
    answers, file = [Answer([1, 2, 3], 2, PARAMS)], tmp_path / "training.pt"
    head = new_head(model, answers, 0)
    training = Training(model, head, make_batches(model, head, answers, SHORT), SHORT)
    training.save(file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ChatError, match="is damaged"):
        training.go_on(file)


@pytest.mark.parametrize("kept", [0, 9, 400, -30])
def test_answers_whose_file_is_damaged_are_said_to_be(tmp_path, kept):
    file = tmp_path / "answers.npz"
    save_answers([Answer([4, 5], 1, PARAMS)], WRITER, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ChatError, match="is damaged"):
        read_answers(file, PARAMS, WRITER)


def test_answers_of_which_none_fits_are_no_batches(model):
    with pytest.raises(ChatError, match="raise --max_length"):
        make_batches(model, new_head(model, [], 0), [Answer([1, 2, 3, 4], 3, PARAMS)], DraftOptions(max_length=3))


def test_an_answer_that_is_shorter_than_its_guesses_counts_for_none(model):
    head, long = new_head(model, [], 0), Answer([*range(30)], 4, PARAMS)
    alone = acceptance(model, head, [long], 5, 40)
    assert acceptance(model, head, [Answer([1, 2, 3, 4], 3, PARAMS), long], 5, 40) == alone


def test_a_saved_head_is_read_as_it_is_in_8_bits(model, tmp_path):
    head = random_head(model, vocabulary=torch.tensor([1, 5, 9]))
    save_head(head, tmp_path)
    read = read_head(Files(tmp_path))
    assert read.ids.tolist() == [1, 5, 9]
    for name in ("fc", "layers.0.self_attn.q_proj", "layers.0.mlp.down_proj"):
        saved, linear = Int8Linear(read.get_submodule(name)), Int8Linear(head.get_submodule(name))
        assert torch.equal(saved.codes, linear.codes)
    weights = sum(states.numel() for states in head.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size < 1.5 * weights + 2000
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


@pytest.mark.parametrize("layer", [0, 99])
def test_a_head_that_takes_in_a_layer_which_the_model_has_not_is_not_trained_further(model, tmp_path, layer):
    head = new_head(model, [], 0)
    head.config.feature_layers = [layer]
    save_head(head, tmp_path)
    with pytest.raises(ChatError, match="is a head for another model"):
        draft_run._begun(model, DraftOptions(start_from=tmp_path))


@pytest.mark.parametrize("kind", ["as others publish it", "as it is trained here"])
def test_the_engine_guesses_what_training_foresees(model, kind, monkeypatch):
    monkeypatch.setattr(Drafts, "look_up", lambda *_: [])
    guess_always(monkeypatch)
    if kind == "as others publish it":
        head = random_head(model, vocabulary=torch.arange(1, 50, 3))
    else:
        torch.manual_seed(1)
        head = new_head(model, [], 17).eval().requires_grad_(False)
        assert head.feature_layers == [1]
    guesses = []
    with running(model, draft=copy.deepcopy(head)) as engine:
        draft = engine.runner.draft

        def listening(requests, *limits):
            made = draft(requests, *limits)
            guesses.append(([*requests[0].ids], [guess.id for guess in made[0]]))
            return made

        monkeypatch.setattr(engine.runner, "draft", listening)
        answer(engine, [5, *range(49), *range(30)], GREEDY)
    assert len(guesses) > 3
    for ids, guessed in guesses:
        text = torch.tensor([[*ids, *guessed]])
        with torch.no_grad():
            computed = model.model(text, output_hidden_states=True)
            of_layers = [computed.hidden_states[behind] for behind in head.feature_layers]
            features = head.fused(of_layers, computed.last_hidden_state)
            passes = unrolled(head, model.model.embed_tokens(text), features, len(guessed))
            logits = [model.lm_head(hidden[0, len(ids) - 1 + n])[head.ids] for n, hidden in enumerate(passes)]
        assert [head.ids[each.argmax()].item() for each in logits] == guessed


@needs_gpu
def test_steps_that_a_gpu_records_write_and_teach_what_others_do(model, monkeypatch):
    monkeypatch.setattr(draft_writer, "LOOK_EVERY", 8)
    recorded = copy.deepcopy(model).to("cuda")
    attention_windows(recorded)
    prompts = [[n, 9, *range(n)] for n in range(40)]
    params = [SamplingParams(max_new_tokens=20 + n, seed=n, temperature=0 if n % 3 == 0 else 1) for n in range(40)]
    said = write(recorded, prompts, params, {7, 20}, 16)
    assert said == write(model, prompts, params, {7, 20}, 16)
    answers = [
        Answer([*prompt, *ids], len(prompt), each)
        for prompt, ids, each in zip(prompts, said, params, strict=True)
        if ids
    ]
    options = DraftOptions(epochs=20, learning_rate=1e-2, batch_tokens=256, max_length=128, guesses=3)
    head = new_head(recorded, answers, 0)
    before = acceptance(recorded, head, answers, 3, 128)
    losses = [
        loss for _, loss, _ in Training(recorded, head, make_batches(recorded, head, answers, options), options).run()
    ]
    assert losses[-1] < losses[0]
    assert acceptance(recorded, head, answers, 3, 128)[0] > before[0] + 0.1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--answers", "60"], "--answers must be more than the 60 held out"),
        (["--epochs", "0"], "--epochs must be above 0"),
        (["--minutes", "-1"], "--minutes must be 0 or more"),
        (["--max_length", "9000"], "--max_length must be from 2 to --batch_tokens"),
        (["--answers_files", "nowhere.npz"], "There is no file nowhere.npz"),
        (["--start_from", "nowhere"], "There is no head in nowhere"),
    ],
)
def test_flags_that_make_no_sense_are_refused_by_name(flags, sentence, capsys):
    with pytest.raises(SystemExit):
        read_arguments(flags)
    assert sentence in capsys.readouterr().err


def test_each_flag_is_explained():
    assert list(HELP) == [f"--{name}" for name in DraftOptions.__dataclass_fields__]
