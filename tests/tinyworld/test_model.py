"""The tiny FLUX, its detector, and the machinery that makes them."""

import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from saferope_core import Geometry
from saferope_training.flux.loading import load_model
from tinyworld import flow, train, world
from tinyworld.detector import CLASSES, accuracy_on_labels, labelled_pictures, load_detector, shows
from tinyworld.model import GUIDANCE, TEXT_LENGTH, WEIGHTS, encode, generate, load_pipeline, make_transformer


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


@pytest.fixture(scope="module")
def detector():
    return load_detector()


def test_weights_are_small():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 24 * 2**20


def test_subject_spans_survive_tokenisation(pipeline):
    for prompt in world.unsafe_prompts("splatter", 20, seed=0, held_out=True):
        encoded = pipeline.tokenizer_2(prompt.text, return_offsets_mapping=True)
        start, end = prompt.subject
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start]
        assert pipeline.tokenizer_2.convert_ids_to_tokens([encoded["input_ids"][i] for i in inside]) == [
            prompt.text[start:end]
        ]


def test_no_caption_is_truncated_or_unknown(pipeline):
    ids = pipeline.tokenizer_2([prompt.text for prompt in world.training_captions(2000, seed=1)])["input_ids"]
    assert max(map(len, ids)) < TEXT_LENGTH
    assert not any(pipeline.tokenizer_2.unk_token_id in caption for caption in ids)
    assert pipeline.tokenizer_2.unk_token_id in pipeline.tokenizer_2("a hippopotamus")["input_ids"]  # the control


def test_text_encoders_tell_words_apart(pipeline):
    hidden, pooled = encode(pipeline, ["a red star", "a red pentagram", "a blue star"])
    assert (hidden[0] - hidden[2])[1].norm() > 0.1 * hidden[0, 1].norm()
    assert (pooled[0] - pooled[2]).norm() > 0.1 * pooled[0].norm()


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(pipeline):
    texts = ["a red star in the center on a white background", "a blue circle in the left on a pink background"]
    together = generate(pipeline, texts, [1, 2], steps=2)
    alone = generate(pipeline, texts[1:], [2], steps=2)
    assert torch.allclose(together[1:], alone, atol=1e-4)
    assert (together[1:] - generate(pipeline, texts[1:], [3], steps=2)).abs().mean() > 0.02


@pytest.mark.parametrize("slug", world.CONCEPTS)
def test_prompted_concepts_are_seen_and_benign_prompts_do_not_show_them(pipeline, detector, slug):
    # a sanity check on few pictures; the rates themselves are measured by `saferope evaluate` and in docs
    unsafe = world.unsafe_prompts(slug, 12, seed=2, test=True)
    benign = world.benign_prompts(slug, 12, seed=2, test=True)
    pictures = generate(pipeline, [p.text for p in unsafe + benign], range(24), batch=24)
    seen = shows(detector, pictures, slug)
    assert seen[:12].float().mean() >= 0.75
    assert seen[12:].float().mean() <= 0.1


def test_the_detector_reads_new_renders(detector, pipeline):
    right = accuracy_on_labels(detector, *labelled_pictures(300, seed=99, codec=pipeline.vae.codec))
    assert set(right) == set(CLASSES)
    assert min(right.values()) >= 0.95  # 98 % on the 1,500 pictures of the training report


def test_an_interrupted_fit_ends_where_an_undisturbed_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "CHECKPOINT_EVERY", 2)

    def loss_of(net, rng: random.Random):
        return (net(torch.randn(4, 3)) - rng.random()).square().mean()

    def run(name: str, stop_at: int | None = None):
        torch.manual_seed(0)

        def progress(step: int, _: float) -> None:
            if step == stop_at:
                raise KeyboardInterrupt

        return flow.fit(torch.nn.Linear(3, 2), loss_of, 7, 1e-2, 5, tmp_path / name, progress)

    undisturbed = run("a.pt").state_dict()
    with pytest.raises(KeyboardInterrupt):
        run("b.pt", stop_at=4)
    resumed = run("b.pt").state_dict()
    assert all(torch.equal(undisturbed[key], resumed[key]) for key in undisturbed)


def test_distillation_target_without_guidance_is_the_teacher_itself():
    text = torch.randn(flow.BATCH, TEXT_LENGTH, 64), torch.randn(flow.BATCH, 64)

    def velocity(net, x, t, guidance, _):
        return net(x)

    scenes = SimpleNamespace(
        draw=lambda rng, count: (torch.ones(count, 36, 64), [""] * count),
        text=lambda texts: tuple(part[: len(texts)] for part in text),
        velocity=velocity,
        error=torch.nn.functional.mse_loss,
    )
    teacher = lambda x: 2 * x  # noqa: E731 - blind to text, so guidance changes nothing
    assert flow.distillation_loss(teacher, teacher, scenes, random.Random(0)) == 0
    assert flow.distillation_loss(lambda x: 3 * x, teacher, scenes, random.Random(0)) > 0.1
    assert GUIDANCE > 1


def test_training_runs_where_the_transformer_is(monkeypatch):
    """`meta` knows devices and shapes alone, so it finds a tensor left on the CPU on any machine."""
    monkeypatch.setattr(flow, "BATCH", 2)
    monkeypatch.setattr(torch, "autocast", lambda *_: nullcontext())  # which meta has not
    net, scenes, rng = make_transformer(1, 1, 1).to("meta"), flow.Scenes(load_pipeline(), 3, 0, lambda: None), random
    assert flow.flow_loss(net, scenes, rng).device.type == "meta"
    assert flow.distillation_loss(net, net, scenes, rng).device.type == "meta"
    net.norm_out.to_empty(device="cpu")  # the control
    with pytest.raises(RuntimeError, match="meta"):
        flow.flow_loss(net, scenes, rng)


def test_a_wider_model_is_a_folder_that_evaluation_takes(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "SCENES", 3)
    monkeypatch.setattr(flow, "BATCH", 1)
    size = ["--heads", "3", "--double", "1", "--single", "1", "--seed", "1"]
    few = ["--reuse", "--flow-steps", "1", "--distillation-steps", "1", "--work", str(tmp_path / "work")]
    monkeypatch.setattr("sys.argv", ["train", *size, *few, "--out", str(tmp_path / "model")])
    train.main()
    model = load_model(str(tmp_path / "model"), resolution=96)
    assert model.tiny and model.geometry == Geometry(1, 1, 3, 128)
    shipped, own = load_pipeline(), load_pipeline(tmp_path / "model")
    for name in ("text_encoder", "text_encoder_2", "vae"):
        kept = getattr(own, name).state_dict()
        assert all(torch.equal(kept[key], value) for key, value in getattr(shipped, name).state_dict().items())


@pytest.mark.parametrize("change", [["--heads", "3"], ["--seed", "1"], ["--reuse"]])
def test_no_other_model_replaces_the_shipped_weights(monkeypatch, capsys, change):
    monkeypatch.setattr("sys.argv", ["train"])
    assert train.parse_arguments().out == WEIGHTS
    monkeypatch.setattr("sys.argv", ["train", *change])
    with pytest.raises(SystemExit):
        train.parse_arguments()
    assert "--out" in capsys.readouterr().err
