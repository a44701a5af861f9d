"""What the settings promise: flags beat the environment, and nonsense ends the program with a sentence."""

from pathlib import Path

import pytest

from llama2_chat import settings
from llama2_chat.errors import ChatError
from llama2_chat.settings import Settings


def test_without_flags_and_environment_the_page_is_for_this_machine_only():
    settings = Settings.read([], {})
    assert (settings.host, settings.port, settings.model_id, settings.quantization) == ("127.0.0.1", 7860, None, "auto")


def test_a_flag_beats_its_environment_variable():
    environ = {"PORT": "8001", "MODEL_ID": "from/environment", "TEMPERATURE": "0.1", "QUANTIZATION": "int8"}
    settings = Settings.read(["--port", "8002", "--model-id", "from/flag", "--temperature", "1.5"], environ)
    assert (settings.port, settings.model_id, settings.quantization) == (8002, "from/flag", "int8")
    assert settings.sampling.temperature == 1.5


def test_port_beats_gradios_own_variable():
    assert Settings.read([], {"PORT": "1", "GRADIO_SERVER_PORT": "2"}).port == 1
    assert Settings.read([], {"GRADIO_SERVER_PORT": "2"}).port == 2


def test_an_empty_variable_counts_as_not_set():
    assert Settings.read([], {"PORT": "", "MODEL_ID": "", "SEED": ""}) == Settings.read([], {})


def test_conversations_are_kept_on_the_server_where_there_is_a_login(capsys):
    assert Settings.read([], {}).history == "browser"
    kept = Settings.read(["--auth-file", "users.txt"], {"HISTORY": "server", "XDG_DATA_HOME": "/data"})
    assert (kept.history, kept.history_dir) == ("server", Path("/data/llama2-chat/history"))
    for environ, sentence in (({"HISTORY": "server"}, "HISTORY=server needs AUTH_FILE"), ({"HISTORY": "x"}, "one of")):
        with pytest.raises(SystemExit):
            Settings.read(["--check"], environ)
        assert sentence in capsys.readouterr().err


def test_a_space_listens_to_the_outside():
    assert Settings.read([], {"SPACE_ID": "someone/chat"}).host == "0.0.0.0"
    assert Settings.read([], {"SPACE_ID": "someone/chat", "GRADIO_SERVER_NAME": "127.0.0.1"}).host == "127.0.0.1"


def test_the_cache_follows_the_users_cache_folder():
    assert Settings.read([], {"XDG_CACHE_HOME": "/big"}).cache_dir == Path("/big/llama2-chat")
    assert Settings.read([], {}).cache_dir == Path("~/.cache/llama2-chat").expanduser()


SPACE = {"SPACE_ID": "someone/chat"}


def test_a_space_with_storage_keeps_its_models_there(monkeypatch, tmp_path):
    monkeypatch.setattr(settings, "PERSISTENT", tmp_path)
    there = Settings.read([], SPACE)
    assert there.cache_dir == tmp_path / "llama2-chat"
    assert there.hub_cache_dir == tmp_path / ".huggingface" / "hub"


@pytest.mark.parametrize("mine", ["HF_HOME", "HF_HUB_CACHE", "CACHE_DIR"])
def test_a_folder_that_somebody_chose_beats_the_storage_of_a_space(monkeypatch, tmp_path, mine):
    monkeypatch.setattr(settings, "PERSISTENT", tmp_path)
    there = Settings.read([], {**SPACE, mine: "/mine"})
    assert (there.cache_dir if mine == "CACHE_DIR" else there.hub_cache_dir) in (Path("/mine"), None)


@pytest.mark.parametrize("lack", ["no storage", "read-only", "no Space"])
def test_without_storage_that_can_be_written_models_go_where_they_always_go(monkeypatch, tmp_path, lack):
    monkeypatch.setattr(settings, "PERSISTENT", tmp_path / "data")
    if lack != "no storage":
        (tmp_path / "data").mkdir()
    if lack == "read-only":  # asked of the system, because root may write what others may not
        monkeypatch.setattr("os.access", lambda path, mode: False)
    there = Settings.read([], {} if lack == "no Space" else SPACE)
    assert (there.cache_dir, there.hub_cache_dir) == (Settings.read([], {}).cache_dir, None)


@pytest.mark.parametrize("value", ["true", "1", "false", ""])
def test_a_space_on_zero_gpu_is_known_by_its_variable(value):
    assert Settings.read([], {**SPACE, "SPACES_ZERO_GPU": value}).zero_gpu is (value in ("true", "1"))


@pytest.mark.parametrize(
    ("argv", "environ", "sentence"),
    [
        (["--quantization", "int3"], {}, "quantization must be one of auto, none, int8, int4, nf4"),
        ([], {"QUANTIZATION": "int3"}, "quantization must be one of"),
        ([], {"KV_CACHE": "fp4"}, "kv_cache must be one of auto, fp8, int8, none; it was 'fp4'"),
        ([], {"SPECULATION": "1"}, "speculation must be auto or off; it was '1'"),
        ([], {"TENSOR_PARALLEL": "two"}, "tensor_parallel must be auto or a number from 1 to 16; it was 'two'"),
        ([], {"PORT": "http"}, "--port: invalid int value: 'http'"),
        (["--port", "70000"], {}, "port must be from 0 to 65535"),
        (["--temperature", "9"], {}, "temperature must be a number from 0 to 5"),
        ([], {"TOP_P": "nan"}, "top_p must be a number above 0 to 1"),
        (["--queue-limit", "0"], {}, "queue_limit must be 1 or more"),
        (["--root-path", "chat"], {}, "root_path must start with a slash"),
        (["--json"], {}, "--json needs --check"),
        ([], {"SETTINGS": "none"}, "settings must be one of all, basic, hidden"),
        (["--notice", "one\ntwo"], {}, "notice must be one line"),
        (["--client-limit", "-1"], {}, "client_limit must be 0 or more"),
        ([], {"BODY_LIMIT_MB": "0"}, "body_limit_mb must be above 0"),
        ([], {"TRUSTED_PROXIES": "10.0.0.0/8,proxy"}, "trusted_proxies must be addresses and networks"),
    ],
)
def test_nonsense_ends_the_program_with_a_sentence(argv, environ, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        Settings.read(argv, environ)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_no_secret_is_part_of_the_settings():
    assert "hf_secret" not in repr(Settings.read([], {"HF_TOKEN": "hf_secret"}))


def test_https_is_for_the_whole_network_and_a_certificate_of_ones_own_asks_for_it():
    assert Settings.read(["--https"], {}).host == "0.0.0.0"
    assert Settings.read([], {"HTTPS": "1"}).https
    assert not Settings.read([], {"HTTPS": "0"}).https
    assert not Settings.read(["--no-https"], {"HTTPS": "1"}).https
    assert Settings.read(["--certfile", "server.crt", "--host", "127.0.0.1"], {}).https
    assert Settings.read(["--certfile", "server.crt", "--host", "127.0.0.1"], {}).host == "127.0.0.1"


def test_the_password_of_a_key_comes_from_the_environment_and_is_never_printed():
    settings = Settings.read([], {"KEY_PASSWORD": "sesame"})
    assert settings.key_password == "sesame"
    assert "sesame" not in repr(settings)


def test_a_tilde_is_the_home_folder_in_every_path():
    read = Settings.read(["--certfile=~/server.crt", "--keyfile=~/server.key", "--cache-dir=~/models"], {})
    assert (read.certfile, read.keyfile) == (Path.home() / "server.crt", Path.home() / "server.key")
    assert read.cache_dir == Path.home() / "models"


@pytest.mark.parametrize("name", ["--cache-dir", "--documents-dir", "--certfile"])
def test_a_home_folder_that_nobody_knows_is_refused(name, capsys):
    # In a container whose user has no home folder, a start ended in a traceback.
    with pytest.raises(SystemExit):
        Settings.read([f"{name}=~nobody-here/kept"], {})
    assert "Set HOME to a folder" in capsys.readouterr().err


@pytest.mark.parametrize("keys", [",", " ", ", ,"])
def test_an_api_key_that_is_none_does_not_let_everybody_in(keys, capsys):
    with pytest.raises(SystemExit):
        Settings.read([], {"API_KEY": keys})
    assert "API_KEY contains no key" in capsys.readouterr().err


def test_api_keys_come_from_the_environment_and_are_never_printed():
    settings = Settings.read([], {"API_KEY": " sesame, mustard,"})
    assert settings.api_keys == ("sesame", "mustard")
    assert "sesame" not in repr(settings)
    assert Settings.read([], {"API_KEY": ""}).api_keys == ()


def test_the_keys_of_a_file_stand_beside_those_of_the_environment_and_are_read_again(tmp_path, caplog, capsys):
    path = tmp_path / "keys.txt"
    path.write_text("# of the office\ntwo\n")
    settings = Settings.read(["--api-key-file", str(path)], {"API_KEY": "one"})
    assert [*settings.api_keys] == ["one", "two"]
    path.write_text("three\n")
    settings.api_keys.read_again()
    assert [*settings.api_keys] == ["one", "three"]
    path.write_text("\n")
    settings.api_keys.read_again()
    assert [*settings.api_keys] == ["one", "three"]
    assert "contains no key" in caplog.text
    with pytest.raises(SystemExit):
        Settings.read(["--api-key-file", str(path)], {})
    assert "contains no key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "limit"), [("127.0.0.1", None), ("localhost", None), ("::1", None), ("0.0.0.0", 10), ("::", 10)]
)
def test_requests_may_be_of_any_size_only_where_nobody_else_can_send_them(host, limit):
    assert Settings.read(["--host", host], {}).body_limit_mb == limit
    assert Settings.read(["--host", host, "--body-limit-mb", "2"], {}).body_limit_mb == 2


def test_servers_that_have_the_model_are_listed_with_commas_and_their_key_is_never_shown():
    read = Settings.read([], {"INFERENCE_URL": " http://a:8000 ,https://b/v1,", "INFERENCE_KEY": " secret\n"})
    assert read.inference_urls == ("http://a:8000", "https://b/v1")
    assert read.inference_key == "secret"
    assert "secret" not in repr(read)
    assert Settings.read([], {}).inference_urls == ()


@pytest.mark.parametrize("url", ["gpu-1:8000", "ftp://gpu-1", "http://", "http://gpu-1:99999", "http://a,b"])
def test_something_that_is_not_an_address_is_refused(url, capsys):
    with pytest.raises(SystemExit):
        Settings.read([], {"INFERENCE_URL": url})
    assert "inference_url must be like" in capsys.readouterr().err


def test_a_guard_has_an_address_and_fails_closed_unless_told():
    read = Settings.read([], {"GUARD_URL": " http://a:8000\n", "GUARD_MODEL": "guard ", "GUARD_KEY": " secret\n"})
    assert (read.guard_url, read.guard_model, read.guard_fails) == ("http://a:8000", "guard", "closed")
    assert read.guard_key == "secret"
    assert "secret" not in repr(read)
    assert Settings.read([], {}).guard_url == ""
    for wrong in ({"guard_url": "gpu-1"}, {"guard_fails": "half open"}, {"guard_model": "guard"}):
        with pytest.raises(ChatError, match=next(iter(wrong))):
            Settings(**wrong)


def test_an_encoder_is_an_id_a_folder_or_an_address():
    environ = {"EMBEDDINGS": " http://a:8000/v1\n", "EMBEDDINGS_MODEL": "e5 ", "EMBEDDINGS_KEY": " secret\n"}
    read = Settings.read([], environ)
    assert (read.embeddings_url, read.embeddings_model, read.embeddings_key) == ("http://a:8000/v1", "e5", "secret")
    assert "secret" not in repr(read)
    assert Settings(embeddings="intfloat/multilingual-e5-small").embeddings_url == ""
    for wrong in ({"embeddings": "http://"}, {"embeddings_model": "e5"}):
        with pytest.raises(ChatError, match="embeddings"):
            Settings(**wrong)


@pytest.mark.parametrize("name", ["INFERENCE_KEY", "GUARD_KEY", "EMBEDDINGS_KEY"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(name, capsys):
    with pytest.raises(SystemExit):
        Settings.read([], {name: "zwölf"})
    assert "zwölf" not in capsys.readouterr().err


def test_white_space_around_a_models_name_is_no_part_of_it():
    settings = Settings.read([], {"MODEL_ID": " someone/tiny\n", "BASE_MODEL": "a/b ", "MODEL_NAME": " mine "})
    assert (settings.model_id, settings.base_model, settings.model_name) == ("someone/tiny", "a/b", "mine")
    assert Settings.read([], {"MODEL_ID": " \n"}).model_id is None


@pytest.mark.parametrize("more", [{"compile": False}, {"inference_url": "http://gpu-1:8000"}])
def test_what_cannot_be_deterministic_is_refused(more):
    with pytest.raises(ChatError, match=r"(?i)deterministic"):
        Settings(deterministic=True, **more)


@pytest.mark.parametrize("more", [{"model_name": "a\nb"}, {"model_name": "a", "inference_url": "http://gpu-1:8000"}])
def test_a_served_name_is_one_line_and_of_a_model_that_is_here(more):
    with pytest.raises(ChatError, match="model_name"):
        Settings(**more)


@pytest.mark.parametrize("adapters", ["law", "law=", "=a/b", "law=a/b,law=c/d", "mine=a/b", "law=a/b,\tx\x1b=c/d"])
def test_adapters_are_names_and_places_and_none_is_called_as_another(adapters, capsys):
    with pytest.raises(SystemExit):
        Settings.read([], {"ADAPTERS": adapters, "MODEL_NAME": "mine"})
    assert "adapters must" in capsys.readouterr().err


def test_adapters_are_listed_with_commas():
    settings = Settings.read([], {"ADAPTERS": " law = ~/law , poems=someone/poems@v1,"})
    assert settings.named_adapters == (("law", "~/law"), ("poems", "someone/poems@v1"))
    with pytest.raises(ChatError, match="INFERENCE_URL"):
        Settings(adapters="law=a/b", inference_url="http://gpu-1")
