"""Loading models and tokenizers: what works, what is refused, and the preset's students."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pruneopd_lab import presets
from pruneopd_lab.tiny.make_models import make_model
from pruneopd_lab.tiny.tokenizer import make_tokenizer
from pruneopd_trainer.config import PRESETS, TrainConfig
from pruneopd_trainer.models import encode, load_model, load_pair, load_tokenizer, same_tokenizer
from trainer_models import refusal, save, word_tokenizer


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a tiny random model."""
    return save(tmp_path / "model", make_model())


@pytest.fixture
def prompts():
    return torch.tensor([[0, 4, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


def test_a_saved_model_is_loaded_bit_for_bit(folder, prompts):
    made = make_model()
    loaded = load_model(save(folder, made), "auto")
    assert loaded.dtype == torch.float32 and not loaded.training
    assert torch.equal(made.eval()(*prompts).logits, loaded(*prompts).logits)
    save(folder, made.bfloat16())
    for precision, dtype in (("auto", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float32")):
        assert load_model(folder, precision).dtype == getattr(torch, dtype)


def llama(**sizes):
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=1, **sizes))


MODELS = {
    "Llama": llama(vocab_size=11, hidden_size=8, intermediate_size=8, attention_dropout=0.5, pad_token_id=0),
    "GPT-2": GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=1, eos_token_id=1, bos_token_id=1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_training_mode_has_no_dropout(tmp_path, name, prompts):
    model = MODELS[name]
    model.save_pretrained(tmp_path)
    ids, _ = prompts
    before = model.train()(ids).logits
    assert not torch.equal(before, model(ids).logits), "no dropout in the first place: the test shows nothing"
    loaded = load_model(tmp_path, "float32")
    assert torch.equal(loaded(ids).logits, loaded.train()(ids).logits)


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert refusal(load_model, tmp_path / "a", "auto") == f"the model folder {tmp_path / 'a'} is not there"
    words = f"the model folder {tmp_path} has neither a .gguf file nor a config.json"
    assert refusal(load_model, tmp_path, "auto") == words


def truncate(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def own_code(folder):
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')


BREAKAGES = {
    "truncated weights": (truncate, "Error while deserializing header"),
    "a missing weight": (
        lambda folder: rewrite(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight")),
        "1 weights are missing: model.layers.1.mlp.up_proj.weight",
    ),
    "a weight of another shape": (
        lambda folder: rewrite(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(3)})),
        r"model.norm.weight must have shape \[96\], got \[3\]",
    ),
    "code of its own": (own_code, ".* contains custom code"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_model_is_refused(folder, breakage):
    break_it, words = BREAKAGES[breakage]
    break_it(folder)
    said = refusal(load_model, folder, "auto")
    assert re.match(f"the model in {folder} cannot be loaded: {words}", said), said


def test_a_tokenizer_pads_on_the_left_with_its_end_token_where_it_has_no_other(tmp_path):
    words = ["<unknown>", "a", "b", "<end>"]
    tokenizer = word_tokenizer(words, eos_token="<end>", padding_side="right")
    save(tmp_path, make_model(), tokenizer)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token == "<end>"
    ids, mask = encode(loaded, ["a b a", "b"])
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.tolist() == [[1, 2, 1], [3, 3, 2]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path, folder):
    (folder / "tokenizer.json").write_text("{}")
    assert refusal(load_tokenizer, folder).startswith(f"the tokenizer in {folder} cannot be loaded: ")
    make_model().save_pretrained(tmp_path)
    assert refusal(load_tokenizer, tmp_path) == f"the model folder {tmp_path} has no tokenizer"
    save(tmp_path, make_model(), word_tokenizer(["a", "b"]))
    words = f"the tokenizer in {tmp_path} must have a padding token or an end token, got neither"
    assert refusal(load_tokenizer, tmp_path) == words


def test_prompts_are_put_into_the_chat_template_or_refused():
    tokenizer = word_tokenizer(["<end>", "user", "assistant", "a", "b"], pad_token="<end>", padding_side="left")
    assert refusal(encode, tokenizer, ["a", " "]) == "a prompt must have at least one token, got ' '"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}{% endfor %}{{ ' assistant' }}"
    )
    ids, mask = encode(tokenizer, ["a", "b b"])
    assert ids.tolist() == [[0, 1, 3, 2], [1, 4, 4, 2]]
    assert mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    assert refusal(encode, tokenizer, ["a"]) == "the prompts from 'a' on cannot be tokenized: no system message"


def test_tokenizers_that_differ_are_refused_with_the_ids():
    assert same_tokenizer(make_tokenizer(), make_tokenizer()) == len(make_tokenizer())
    one, other = word_tokenizer(["a", "b", "c"]), word_tokenizer(["a", "c", "b", "d", "e", "f"])
    assert refusal(same_tokenizer, one, other) == (
        "the student and the teacher must have the same tokenizer, got 5 ids that differ: "
        "1 ('b' and 'c'), 2 ('c' and 'b'), 3 (no token and 'd'), ..."
    )


def test_a_pair(folder, tmp_path):
    """Heads may be padded, the teacher may have another precision, and all end tokens count."""
    wide = make_model()
    wide.resize_token_embeddings(128)
    wide.generation_config.eos_token_id = [1, 5, 127]
    teacher = save(tmp_path / "teacher", wide)
    pair = load_pair(TrainConfig(student=folder, teacher=teacher, teacher_precision="bfloat16"))
    assert pair.vocab_size == len(make_tokenizer()) < 128
    assert pair.end_ids == [1, 5]
    assert (pair.student.dtype, pair.teacher.dtype) == (torch.float32, torch.bfloat16)
    assert all(weight.requires_grad for weight in pair.student.parameters())
    assert not any(weight.requires_grad for weight in pair.teacher.parameters())
    assert not pair.teacher.training
    # A student is trained in float32 even if it was saved in another precision.
    half = save(tmp_path / "student", make_model().bfloat16())
    assert load_pair(TrainConfig(student=half, teacher=folder)).student.dtype == torch.float32


def test_a_checkpoint_takes_the_students_place(tmp_path, folder):
    checkpoint = save(tmp_path / "checkpoint", make_model())
    pair = load_pair(TrainConfig(student=tmp_path / "nothing", teacher=folder), checkpoint)
    saved = load_file(checkpoint / "model.safetensors")["model.norm.weight"]
    assert torch.equal(pair.student.model.norm.weight, saved)
    assert refusal(load_pair, TrainConfig(teacher=folder)) == "TrainConfig: student must be a model folder, got None"


def test_a_head_that_is_too_small_is_refused(tmp_path, folder):
    small = make_model()
    small.resize_token_embeddings(100)
    words = refusal(load_pair, TrainConfig(student=folder, teacher=save(tmp_path / "teacher", small)))
    assert words == f"the teacher's embedding must have a row for each of {len(make_tokenizer())} tokens, got 100"


def test_a_pair_that_never_ends_is_refused(tmp_path):
    model = make_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    save(tmp_path, model, word_tokenizer(["a", "b"], pad_token="a"))
    words = f"the tokenizer in {tmp_path} has no token that ends a response"
    assert refusal(load_pair, TrainConfig(student=tmp_path, teacher=tmp_path)) == words


def test_the_tiny_pair_is_part_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "TINY", tmp_path)
    for name in ("teacher", "low", "high"):
        save(tmp_path / name, make_model())
    pair = presets.load_pair(TrainConfig(pair="high"))
    assert pair.student.name_or_path == str(tmp_path / "high")
    assert pair.teacher.name_or_path == str(tmp_path / "teacher")
    words = "TrainConfig: pair must be one of low, high, bilingual with the preset tiny, got 'drop4'"
    assert refusal(presets.load_pair, TrainConfig(pair="drop4")) == words


def test_a_student_of_smollm2_lacks_the_layers_that_do_least(tmp_path, monkeypatch, prompts):
    """In this stand-in for SmolLM2, layers 1 and 2 pass their input on, so a student without them computes the same."""
    teacher = make_model()
    with torch.no_grad():
        for layer in teacher.model.layers[1:3]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    monkeypatch.setattr(presets, "smollm2_folder", lambda: save(tmp_path / "smollm2", teacher))
    monkeypatch.setitem(presets.REMOVED_LAYERS, "drop2", 2)
    config = TrainConfig(preset="smollm2", pair="drop2", teacher_precision="bfloat16")
    pair = presets.load_pair(config)
    assert (pair.student.config.num_hidden_layers, pair.teacher.config.num_hidden_layers) == (2, 4)
    assert (pair.student.dtype, pair.teacher.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(pair.student(*prompts).logits, teacher(*prompts).logits)
    assert all(weight.requires_grad for weight in pair.student.parameters())
    other = presets.load_pair(TrainConfig(preset="smollm2", pair="drop2", teacher=tmp_path / "smollm2"))
    assert other.teacher.dtype == torch.float32
    known = "one of drop1, drop4, drop10, drop2 with the preset smollm2"
    assert refusal(presets.load_pair, TrainConfig(preset="smollm2")) == f"TrainConfig: pair must be {known}, got 'low'"
    assert PRESETS["smollm2"].pair in presets.REMOVED_LAYERS


def write_gguf(model, file):
    """Write a Llama as a GGUF file. It has one head, so that no rows of its projections are permuted."""
    gguf = pytest.importorskip("gguf")
    writer, config = gguf.GGUFWriter(file, "llama"), model.config
    values = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps, "rope_dimension_count": config.head_dim,
        "rope_freq_base": config.rope_parameters["rope_theta"], "vocab_size": config.vocab_size,
    }  # fmt: skip
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = weight.shape[0]  # GGUF has the two halves of a head interleaved
            weight = weight.view(2, rows // 2, -1).transpose(0, 1).reshape(rows, -1)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.contiguous().numpy())
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()


def test_a_gguf_model_can_be_trained_and_saved(tmp_path, prompts):
    model = llama(
        vocab_size=32, hidden_size=32, intermediate_size=32, initializer_range=0.5, max_position_embeddings=64
    )
    write_gguf(model, tmp_path / "model.gguf")
    loaded = load_model(tmp_path, "float32")
    torch.testing.assert_close(loaded(*prompts).logits, model.eval()(*prompts).logits)
    loaded(*prompts).logits.sum().backward()
    assert all(weight.grad is not None for weight in loaded.parameters())
    loaded.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", "auto")
    assert torch.equal(again(*prompts).logits, loaded(*prompts).logits)
