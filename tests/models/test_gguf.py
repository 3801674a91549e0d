"""GGUF files that are not read as they mean it: refused in a sentence. A real one is in tests/test_real_model.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from alignblind_mi.models import gguf
from alignblind_mi.models.fingerprints import fingerprint
from alignblind_mi.models.gguf import check_gguf
from alignblind_mi.models.loading import check_model, load_huggingface
from alignblind_mi.models.spec import ModelError, ModelSpec

TOKENS = ["<unk>", "<s>", "</s>", *(chr(i) for i in range(33, 127)), "ab", "<|endoftext|>"]    # the last one is added where it is not there

SHAPES = {"token_embd.weight": (len(TOKENS), 16), "blk.0.ffn_down.weight": (16, 24),
          **{f"blk.0.attn_{name}.weight": (16, 16) for name in ("q", "k", "v", "output")},
          **dict.fromkeys(("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"), (24, 16))}    # all others: (16,)
WHOLE = (*SHAPES, "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")


def write(path: Path, *, family: str = "llama", pre: str = "llama-bpe", more: dict[str, Any] | None = None,
          tensors: tuple[str, ...] = (), fill: float = 1.0) -> Path:
    """A file that says what a small Llama's says, and something more."""
    writer = GGUFWriter(path, family)
    for name, value in {"context_length": 64, "block_count": 1, "embedding_length": 16, "feed_forward_length": 24,
                        "attention.head_count": 2, "attention.head_count_kv": 2, "rope.dimension_count": 8}.items():
        writer.add_uint32(f"{family}.{name}", value)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{family}.rope.freq_base", 10000.0)
    for name, value in (more or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{family}.{name}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 4), 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name in dict.fromkeys(("token_embd.weight", "output_norm.weight", *tensors)):
        writer.add_tensor(name, np.full(SHAPES.get(name, (16,)), fill, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def spec(path: Path) -> ModelSpec:
    return ModelSpec(str(path))


@pytest.mark.parametrize(("made", "said"), [
    ({"more": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}}, r"does not read from GGUF \(llama.rope.scaling.type = yarn"),
    ({"more": {"logit_scale": 0.5}}, r"llama.logit_scale = 0.5"),
    ({"more": {"final_logit_softcapping": 30.0}}, r"final_logit_softcapping"),
    ({"more": {"attention.sliding_window": 4096}}, r"sliding_window = 4096"),
    ({"tensors": ("rope_freqs.weight",)}, r"rope_freqs.weight"),
    ({"pre": "a-new-way"}, r"splits texts in a way .*'a-new-way'"),
])
def test_what_transformers_would_leave_out_is_named(made, said, tmp_path):
    path = write(tmp_path / "x.gguf", **made)
    for ask in (check_gguf, check_model):
        with pytest.raises(ModelError, match=said):
            ask(spec(path))


@pytest.mark.parametrize("made", [{}, {"more": {"rope.scaling.type": "none"}}, {"more": {"logit_scale": 1.0, "vocab_size": len(TOKENS)}}])
def test_what_changes_nothing_is_no_reason(made, tmp_path):
    check_model(spec(write(tmp_path / "x.gguf", **made)))


def test_files_that_are_none(tmp_path):
    path = write(tmp_path / "x.gguf")
    whole = path.read_bytes()
    for content, said in ((whole[:200], "is damaged"), (b"PK\3\4" + whole[4:], "is no GGUF file"), (b"", "is no GGUF file"),
                          (b"GGUF\0\0\0\3" + whole[8:], "other byte order")):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=said):
            check_model(spec(path))
    path.unlink()
    with pytest.raises(ModelError, match="there is no file"):
        check_model(spec(path))
    path.mkdir()
    with pytest.raises(ModelError, match=r"there is no file|is a folder"):
        check_model(spec(path))


def test_an_architecture_that_transformers_does_not_read_is_said(tmp_path):
    with pytest.raises(ModelError, match="jais"):
        check_model(spec(write(tmp_path / "x.gguf", family="jais")))


def test_names_of_files_here_and_on_the_hub(tmp_path):
    here, there = spec(tmp_path / "x.gguf"), ModelSpec("owner/model/sub/x.Q4.gguf")
    assert (here.gguf_file, Path(here.source)) == ("x.gguf", tmp_path)
    assert (there.gguf_file, there.source) == ("sub/x.Q4.gguf", "owner/model")
    assert ModelSpec("owner/model-GGUF").gguf_file is None
    with pytest.raises(ModelError, match="cannot be found or reached"):
        check_model(there)


def test_its_fingerprint_follows_its_content_alone(tmp_path):
    path = write(tmp_path / "x.gguf")
    before = fingerprint(spec(path), None)
    (tmp_path / "beside.json").write_text("{}")
    assert fingerprint(spec(path), None) == before
    write(path, more={"rope.scaling.type": "none"})
    assert fingerprint(spec(path), None) != before


def test_a_header_is_parsed_once_a_load_and_not_kept(tmp_path, monkeypatch):
    """Of a large vocabulary parsing takes seconds and the parsed header hundreds of MiB; a file that has changed is parsed anew."""
    parsed = []

    def counted(path):
        parsed.append(path)
        return GGUFReader(path)

    for name in ("gguf.gguf_reader.GGUFReader", "gguf.GGUFReader"):
        monkeypatch.setattr(name, counted)
    path = tmp_path / "x.gguf"
    for times, fill in enumerate((0.5, 0.25), 1):
        write(path, tensors=WHOLE, fill=fill)
        check_model(spec(path))
        model, _ = load_huggingface(spec(path).resolved())
        assert float(model.get_input_embeddings().weight.mean()) == fill
        assert parsed == [path] * times
        assert gguf._header.cache_info().currsize == 0
