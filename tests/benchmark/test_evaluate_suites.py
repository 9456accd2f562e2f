"""Whole comparisons: methods and baselines wired, strengths chosen, suites constructed, several processes,
one table."""

from __future__ import annotations

import csv
import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from saferope import cli
from saferope_benchmark.evaluation import compare, evaluate, file_report, methods
from saferope_benchmark.evaluation.methods import Method, unprotected
from saferope_benchmark.evaluation.tables import COSTS, Row
from saferope_benchmark.plots import Point, pareto
from saferope_benchmark.prompt_sets import BENIGN, UNSAFE, Sizes, tiny_world_sets
from saferope_benchmark.scores import KEPT, SHOWN, Absent
from saferope_benchmark.scores.detector import detector
from saferope_benchmark.scores.distance import distance
from saferope_benchmark.suites import ablations, contenders, dial, figures, positions, rotations
from saferope_core import load_concepts
from saferope_training.flux.loading import load_model
from saferope_training.flux.models import edited, encode
from saferope_training.settings import Settings
from tests.support import warm
from tinyworld.model import generate, load_pipeline

ROOT = Path(__file__).parents[2]
STAR = ROOT / "tinyworld" / "concepts" / "star.safetensors"
FEW = Sizes(1, 1, 1, 2)


@pytest.fixture(scope="module")
def tiny_world():
    return load_model("tinyworld")


@contextmanager
def painting_grey(model):
    vae, real = model.pipe.vae, model.pipe.vae.decode

    def decode(latents, **more):
        output = real(latents)
        return replace(output, sample=torch.zeros_like(output.sample))

    vae.decode = decode
    try:
        yield
    finally:
        del vae.decode


def test_painting_grey_erases_all_and_ruins_the_rest(tiny_world, tmp_path):
    """The negative control of the table: nothing is shown, and benign accuracy is near chance."""
    sets = tiny_world_sets("star", Sizes(4, 0, 0, 6))
    grey = Method("grey", "grey", painting_grey, "star", 1.0)
    metrics = [detector(), distance()]
    rows = evaluate.run(evaluate.Evaluation(tiny_world, sets, [unprotected(), grey], metrics, tmp_path, 12))
    found = {(row.method, row.measure): row for row in rows}
    shown = found["grey", "star shown"]
    assert (shown.unprotected, shown.value) == (1, 0) and shown.p_value == 2 / 2**4
    assert found["unprotected", "all attributes right"].value >= 0.95
    for field in ("shape", "color", "background"):
        assert found["grey", f"{field} right"].value <= 0.4, "one colour, one background, one shape is right by chance"
    assert found["grey", "mean difference"].value > 30


def evaluated_by_two(said, *arguments):
    """What `saferope evaluate` says in two real processes, together."""
    processes = warm.start_several(2, ["evaluate", *arguments], said)
    return "".join(warm.ended(process, said.with_suffix(f".{number}")) for number, process in enumerate(processes))


def test_two_processes_share_out_fits_that_gather_statistics(tmp_path):
    """Rand's statistics are sums over processes: fitted by one while the other waited, they waited for each other."""
    few = ("--unsafe", "1", "--benign", "1", "--no-search", "--out", str(tmp_path))
    evaluated_by_two(tmp_path / "said", "--suite", "quick", "--baselines", "rand,uce", *few)
    assert {path.name for path in (tmp_path / "fits").iterdir()} == {"rand-star.safetensors", "uce-star.safetensors"}
    table = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert "| rand, 1 |" in table and "| uce, 1 |" in table


def test_two_processes_give_the_table_of_one(tiny_world, tmp_path):
    (report,) = file_report.evaluate_file(tiny_world, STAR, tmp_path / "one", 1.0, FEW)
    file_report.write_reports(tmp_path / "one", [report], STAR)
    told = evaluated_by_two(
        tmp_path / "said", str(STAR), "--unsafe", "1", "--benign", "2", "--out", str(tmp_path / "two")
    )
    assert told.count("| measure |") == 1, "one of them tells"
    tables = []
    for name in ("one", "two"):
        with (tmp_path / name / "star.evaluation.csv").open() as file:
            tables.append([line for line in csv.DictReader(file) if line["unit"] not in COSTS])
    assert tables[0] == tables[1] and len(tables[0]) >= 10
    assert len(list((tmp_path / "two").rglob("*.png"))) == 2 * 5 + 1


def test_what_is_done_to_embeddings_is_painted(tiny_world):
    """Baselines that work on prompts (DES, SAFREE) are not measured as the unprotected model."""
    texts, seeds = ["a red star in the center on a white background", "a blue ring , left , black wall"], [3, 4]
    plain = evaluate.paint(tiny_world, texts, seeds)
    assert torch.equal(plain, generate(tiny_world.pipe, texts, seeds))
    emptied = encode(tiny_world, ["", ""])
    with edited(tiny_world, lambda _texts, _text: emptied):
        other = evaluate.paint(tiny_world, texts, seeds)
    assert (other - plain).abs().mean() > 0.05
    assert torch.equal(evaluate.paint(tiny_world, texts, seeds), plain)


class Shade:
    """A baseline that darkens what it paints, by as much as it was fitted to."""

    STRENGTHS = (0.0, 0.5, 1.0)
    fits = 0

    @classmethod
    def fit(cls, model, task, seed, progress):
        cls.fits += 1
        progress(1, 2)
        return {"shade": torch.tensor([0.5 + seed])}

    @staticmethod
    @contextmanager
    def applied(model, state, strength):
        model.dark.append(strength * state["shade"].item())
        yield
        model.dark.pop()


def test_a_baseline_is_fitted_once_and_applied_at_its_strengths(tmp_path):
    told, model, before = [], SimpleNamespace(dark=[]), Shade.fits

    def made(seed=0, task="star"):
        methods.fit_baseline("shade", Shade, model, task, "star", tmp_path, "w", seed, lambda *step: told.append(step))
        return methods.baseline("shade", Shade, "star", tmp_path)

    found = made()
    assert [method.strength for method in found] == [0.0, 0.5, 1.0] and told == [("fit shade", 1, 2)]
    with found[1].context(model):
        assert model.dark == [0.25]
    assert model.dark == [] and found[1].folder == "shade-star-0.5"
    assert [method.identity for method in made()] == [method.identity for method in found] and Shade.fits == before + 1
    assert made(seed=1)[1].identity != found[1].identity and Shade.fits == before + 2, "another seed, another state"
    made(task="other")
    assert Shade.fits == before + 3
    (tmp_path / "shade-star.safetensors").write_bytes(b"cut off")
    made()
    assert Shade.fits == before + 4


@pytest.fixture
def shaded(monkeypatch):
    """The dictionary of baselines as that package has it, with one of ours in it."""
    package, task = ModuleType("saferope_benchmark.baselines"), ModuleType("saferope_benchmark.baselines.task")
    package.BASELINES, task.task_of = {"shade": Shade}, lambda records: tuple(record.text for record in records)
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "saferope_benchmark.baselines", package)
    monkeypatch.setitem(sys.modules, "saferope_benchmark.baselines.task", task)
    monkeypatch.setattr(sys.modules["saferope_benchmark"], "baselines", package, raising=False)


def test_baselines_are_wired_by_name(model, shaded, tmp_path):
    settings = Settings(concept="star", unsafe_prompts=3, benign_prompts=3)
    found = contenders.fitted_baselines(model, settings, "star", tmp_path, None, lambda *_: None)
    assert [(method.name, method.concept, method.strength) for method in found] == [
        ("shade", "star", strength) for strength in Shade.STRENGTHS
    ]
    assert contenders.fitted_baselines(model, settings, "star", tmp_path, (), lambda *_: None) == []
    with pytest.raises(ValueError, match="got tint, expected some of shade"):
        contenders.fitted_baselines(model, settings, "star", tmp_path, ("tint",), lambda *_: None)


def test_baselines_that_are_not_there_are_named(model, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "saferope_benchmark.baselines", None)
    (absent,) = contenders.fitted_baselines(model, Settings(concept="star"), "star", tmp_path, None, lambda *_: None)
    assert isinstance(absent, Absent) and absent.name == "baselines"


def point(strength, shown, right, name="esd"):
    head = ("star", name, strength)
    return [
        Row(*head, UNSAFE, "star shown", 50, shown, 1.0, column=SHOWN),
        Row(*head, BENIGN, "all attributes right", 100, right, 0.98, column=KEPT),
        Row(*head, "neighbours", "shape right", 100, 0.0, 0.98, column=KEPT),
    ]


def at(strength, name="esd"):
    return Method(name, f"{strength}", lambda model: None, "star", strength)


def test_the_reported_strength_is_the_best_that_spares_benign_pictures():
    own = [at(strength) for strength in (1, 2, 3, 4)]
    rows = [*point(1, 0.5, 0.98), *point(2, 0.2, 0.96), *point(3, 0.0, 0.95), *point(4, 0.2, 0.97)]
    chosen, notes = compare.choose(rows, [unprotected(), *own])
    assert [method.strength for method in chosen] == [None, 4] and notes == [], "as good and milder"
    chosen, notes = compare.choose([*point(1, 0.3, 0.9), *point(2, 0.0, 0.8)], own[:2])
    assert [method.strength for method in chosen] == [1] and "no strength within 2 points" in notes[0].why
    assert compare.choose([], own) == (own, []), "nothing tells: all are reported"
    usual = replace(own[1], default=True)
    chosen, _ = compare.choose(rows, [own[0], usual, *own[2:]])
    assert chosen == [usual], "what users get is reported, also where another strength did better"


def test_pareto_has_a_point_for_every_strength(tmp_path):
    rows = [*point(1, 0.5, 0.98), *point(2, 0.2, 0.96), *point(1, 0.1, 0.90, "uce")]
    points = compare.front(rows, [unprotected(), at(1), at(2), at(1, "uce")])
    assert [(p.method, p.strength, p.unsafe, round(p.damage, 9)) for p in points] == [
        ("esd", 1, 0.5, 0.0),
        ("esd", 2, 0.2, 0.02),
        ("uce", 1, 0.1, 0.08),
    ]
    assert points[0].interval[0] < 0.5 < points[0].interval[1]
    pareto(tmp_path / "pareto.png", [*points, Point("zappy", "uce", None, 0.1, None, 0.0)], "benign damage")
    assert (tmp_path / "pareto.png").stat().st_size > 5000


def test_quick_suite_runs_and_goes_on(tiny_world, monkeypatch, shaded, tmp_path):
    """The command, the search, the table; called again it paints nothing."""
    monkeypatch.setattr("saferope_training.flux.loading.load_model", lambda *_: tiny_world)
    monkeypatch.setattr(evaluate, "paint", lambda model, texts, seeds: generate(model.pipe, texts, seeds, steps=1))
    arguments = ["evaluate", "--suite", "quick", "--baselines", "none", "--unsafe", "2", "--benign", "2"]
    arguments += ["--out", str(tmp_path)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "| saferope, " in result.output and (tmp_path / "pareto.png").is_file()
    facts = json.loads((tmp_path / "evaluation.json").read_text())
    assert [entry["name"] for entry in facts["methods"]] == ["unprotected", "saferope"], "one strength of several"
    searched = json.loads((tmp_path / "search" / "evaluation.json").read_text())
    assert [entry["strength"] for entry in searched["methods"]] == [None, *contenders.STRENGTHS]
    monkeypatch.setattr(evaluate, "paint", None)
    again = CliRunner().invoke(cli.app, arguments)
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "evaluation.json").read_text())["rows"] == facts["rows"]


def test_paper_flux_on_a_stand_in(monkeypatch, tmp_path):
    """A model folder as FLUX's, files as users have them; what has no weights here is named, NudeNet is real."""
    monkeypatch.setitem(sys.modules, "saferope_benchmark.baselines", None)
    load_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "i2p.csv").write_text("prompt,nudity_percentage,sd_seed\na star,9.0,5\na ring,0.0,6\na heart,1.0,7\n")
    captions = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "a blue ring"}]}
    (tmp_path / "coco.json").write_text(json.dumps(captions))
    (tmp_path / "concepts").mkdir()
    (tmp_path / "concepts" / "nudity.safetensors").write_bytes(STAR.read_bytes())
    arguments = ["evaluate", "--suite", "paper-flux", "--model", str(tmp_path / "model"), "--resolution", "96"]
    arguments += ["--i2p", str(tmp_path / "i2p.csv"), "--captions", str(tmp_path / "coco.json"), "--no-search"]
    arguments += [
        "--concepts",
        str(tmp_path / "concepts"),
        "--unsafe",
        "1",
        "--benign",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    real = evaluate.sample
    monkeypatch.setattr(evaluate, "sample", lambda *given, **more: real(*given, steps=1, **more))
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    missing = {entry["name"] for entry in facts["left_out"]}
    assert {"CLIP", "VQA", "LPIPS", "KID and FID, Inception", "baselines", "saferope for gore"} <= missing
    assert "NudeNet" not in missing and "I2P" not in missing
    rows = [row for row in facts["rows"] if row["measure"] == "NudeNet core at 0.6" and row["method"] == "saferope"]
    assert {(row["concept"], row["set"], row["count"]) for row in rows} == {
        ("nudity", "unsafe", 1),
        ("nudity", "I2P", 2),
        ("nudity", "captions", 1),
    }
    raw = [json.loads(line) for line in (tmp_path / "out" / evaluate.RAW).open()]
    assert {entry["seed"] for entry in raw if "i2p" in entry["picture"]} == {5, 7}
    assert {entry["concept"] for entry in raw} == {"", "nudity", "gore", "van-gogh", "pikachu"}


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "got neither, expected a concept file or --suite"),
        (["a.safetensors", "--suite", "quick"], "got both"),
        (["--suite", "nothing"], "expected one of tinyworld, quick, paper-flux, ablations"),
        (["--suite", "quick", "--only", "moon", "--baselines", "none"], "expected one of star"),
    ],
)
def test_mistakes_are_told(tiny_world, monkeypatch, tmp_path, arguments, told):
    monkeypatch.setattr("saferope_training.flux.loading.load_model", lambda *_: tiny_world)
    result = CliRunner().invoke(cli.app, ["evaluate", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2 and told in " ".join(result.output.replace("│", " ").split()), result.output
    assert "Traceback" not in result.output


def test_random_positions_move_text_and_nothing_else(tiny_world):
    ids = positions.places(24, 16, 0)
    assert ids.shape == (24, 3) and ids[:, 0].abs().max() == 0 and 0 <= ids.min() and ids.max() <= 16
    assert torch.equal(ids, positions.places(24, 16, 0)) and not torch.equal(ids, positions.places(24, 16, 1))
    text, seeds = ["a red star in the center on a white background"], [3]
    plain = evaluate.paint(tiny_world, text, seeds)
    still, thrown = positions.random_positions(spreads=(0, 16), draws=(0,))
    painted = []
    for method in (still, thrown):
        with method.context(tiny_world):
            painted.append(evaluate.paint(tiny_world, text, seeds))
    assert torch.equal(painted[0], plain), "everybody at (0, 0, 0), as FLUX has it"
    assert (painted[1] - plain).abs().mean() > 0.01
    assert torch.equal(evaluate.paint(tiny_world, text, seeds), plain), "the hook came off"


def test_groups_of_heads_part_the_model(tiny_world, tmp_path, monkeypatch):
    """All heads are the critical ones and the others; a random rotation of any group changes what is painted."""
    monkeypatch.setattr(rotations, "settings_for", lambda *a, **c: Settings(unsafe_prompts=6, benign_prompts=6, **c))
    methods = rotations.random_rotations(tiny_world, tmp_path, ("star",), lambda *_: None)
    names = (rotations.TELLING, rotations.ALL, rotations.OTHERS)
    assert [method.name for method in methods[:: len(rotations.AMOUNTS)]] == list(names)
    chosen = torch.tensor([[True, False], [False, True]])
    table = SimpleNamespace(critical=chosen, discrimination=torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    for critical in (chosen, torch.ones_like(chosen)):  # where all are critical, the half of highest Δ
        table.critical = critical
        telling, everything, others = rotations.groups(table).values()
        assert torch.equal(telling, chosen) and torch.equal(others, ~chosen) and everything.all()
    text, seeds = ["a red star in the center on a white background"], [3]
    plain = evaluate.paint(tiny_world, text, seeds)
    with methods[-1].context(tiny_world):
        assert (evaluate.paint(tiny_world, text, seeds) - plain).abs().mean() > 1e-3


def test_variants_share_one_extraction(tiny_world, tmp_path, monkeypatch):
    """Table 2's files differ in what they are said to differ in, and are not made twice."""
    few = {"unsafe_prompts": 6, "benign_prompts": 6, "steps": 2, "phase": 1, "batch": 2, "unlearn_at": (1.0,)}
    monkeypatch.setattr(ablations, "settings_for", lambda *_: Settings(**few))
    chosen = {"rank 2": {**ablations.CALIBRATED, "rank": 2}, "shared": {**ablations.CALIBRATED, "sharing": "shared"}}
    told = []
    for _ in range(2):
        methods = ablations.variants(tiny_world, tmp_path, ("star",), lambda *step: told.append(step), chosen)
    assert [method.name for method in methods] == ["rank 2", "shared"]
    two, shared = (load_concepts(tmp_path / f"star.{number:02d}" / "star.safetensors")[0] for number in (1, 2))
    assert (two.rank, shared.rank) == (2, 5)
    single = shared.heads[:, 0] == 1
    assert torch.allclose(shared.image.generator[single], 0.01 * shared.text.generator[single])
    assert not torch.allclose(
        two.image.generator[two.heads[:, 0] == 1], 0.01 * two.text.generator[two.heads[:, 0] == 1]
    )
    assert sum(step[:2] == ("train", 1) and step[2] == 2 for step in told) == 2, "each trained once"
    assert sum(step[0] == "extract" and step[2] > 1 for step in told) == sum(
        step[0] == "extract" and step[2] > 1 for step in told[: len(told) // 2 + 1]
    )


def test_suites_figures_are_drawn(tmp_path):
    def shown(method, concept, value, strength=None, kind=UNSAFE, column=SHOWN):
        return Row(concept, method, strength, kind, f"{concept} {column}", 10, value, 1.0, column=column)

    methods = [unprotected(), Method("star's file", "", None), Method("zappy's file", "", None)]
    rows = [shown(m.name, concept, 0.5) for m in methods for concept in ("star", "zappy")]
    figures.draw_matrix(rows, methods, tmp_path)
    rows = [shown("unprotected", "star", 1.0), shown("thrown", "star", 0.5, 4.0)]
    rows += [shown("unprotected", "star", 0.9, None, BENIGN, KEPT), shown("thrown", "star", 0.8, 4.0, BENIGN, KEPT)]
    figures.draw_positions(rows, [], tmp_path)
    figures.draw_rotations([*point(1, 0.5, 0.98)], [at(1)], tmp_path)
    sizes = [(tmp_path / f"{name}.png").stat().st_size for name in ("crossed", "positions", "rotations")]
    assert min(sizes) > 4000


def test_the_dial_is_drawn_and_seeds_are_spread(tmp_path):
    """Means over the seeds at strength 1 alone, of trained files alone."""

    def shown(method, strength, value):
        return Row("star", method, strength, UNSAFE, "star shown", 10, value, 0.9, column=SHOWN)

    ours = [shown(dial.OURS, strength, 0.5 if strength < 1 else 0.1) for strength in dial.STRENGTHS]
    others = [shown(f"{dial.OURS}, seed {seed}", 1.0, 0.1 * seed) for seed in (1, 2)]
    rows = [*ours, *others, *(shown(dial.CALIBRATED, strength, 0.7) for strength in dial.STRENGTHS)]
    dial.draw_dial(rows, [], tmp_path)
    assert (tmp_path / "dial.png").stat().st_size > 4000
    assert "| concept shown, unsafe | 90.0 % | 13.3 % | 10.0 % | 20.0 % |" in (tmp_path / "dial.md").read_text()


def test_the_dial_has_files_of_each_seed_and_strength(tiny_world, tmp_path, monkeypatch):
    few = {"unsafe_prompts": 6, "benign_prompts": 6, "steps": 2, "phase": 1, "batch": 2, "unlearn_at": (1.0,), "fit": 1}
    monkeypatch.setattr(dial, "settings_for", lambda *_: Settings(**few))
    methods = dial.turned_up(tiny_world, tmp_path, ("star",), lambda *_: None)
    of = {name: [m.strength for m in methods if m.name == name] for name in {m.name for m in methods}}
    assert of.pop(dial.OURS) == of.pop(dial.CALIBRATED) == list(dial.STRENGTHS)
    assert of == {f"{dial.OURS}, seed {seed}": [1.0] for seed in dial.SEEDS[1:]}
    assert len({m.identity for m in methods}) == len(methods), "no file stands for another"
