from __future__ import annotations

import json

import pytest

from rlhf_data.errors import InputError
from rlhf_data.tokenizer import load_tokenizer


def refused(path: str) -> str:
    with pytest.raises(InputError) as error:
        load_tokenizer(path)
    return str(error.value)


def test_a_tokenizer_comes_back_as_it_is(tokenizer, tmp_path, chat_templates):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert len(loaded) == len(tokenizer)
    assert loaded.pad_token is None
    assert loaded.encode("the cat") == tokenizer.encode("the cat")
    assert (
        load_tokenizer(str(tmp_path), chat_template=chat_templates["chatml"]).chat_template == chat_templates["chatml"]
    )


def test_what_is_wrong_with_a_tokenizer_folder_is_said(tokenizer, tmp_path):
    assert "does not exist" in refused("./no/such/folder")
    (tmp_path / "empty").mkdir()
    assert "it has no tokenizer files" in refused(str(tmp_path / "empty"))
    tokenizer.save_pretrained(tmp_path / "broken")
    file = tmp_path / "broken" / "tokenizer.json"
    assert "give the folder it is in" in refused(str(file))
    file.write_text(json.dumps({"version": "1.0"}))
    assert "tokenizer.json" in refused(str(tmp_path / "broken"))
    assert "nor (if the Hub can be reached at all)" in refused("org/no-such-model")
