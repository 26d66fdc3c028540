"""Teachers: packed they say what they say one prefix at a time, losses are their formula, and runs go on with them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_training import FAST, ITEMS, SHAPE, SIZES, catalogue, rings  # noqa: F401

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.config import METHODS, SOFTMAX_OVER
from nezha_vllm.hf.prompt import prompt_token_ids
from nezha_vllm.item_tokens import ItemTokens
from nezha_vllm.semantic_id import SemanticIdCodec
from nezha_vllm.training.fit import codes_of, fit
from nezha_vllm.training.graphs import StepGraphs
from nezha_vllm.training.item_embeddings import ItemEmbeddings
from nezha_vllm.training.item_loss import ItemLoss
from nezha_vllm.training.lesson import Codes, Lesson
from nezha_vllm.training.options import TrainingOptions
from nezha_vllm.training.packing import PackedCollator, packed, shortened
from nezha_vllm.training.sasrec import SasRecModel, SasRecOptions
from nezha_vllm.training.start import load_trained, save_trained, starting_model
from nezha_vllm.training.teacher_models import SasRecTeacher
from nezha_vllm.training.teachers import TaughtCollator, Teachers, numbered

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (3, 6, 2, 4, 7, 5)
CPU, NO_SPLIT = torch.device("cpu"), SimpleNamespace(valid_history=[], valid_target=[])


@pytest.fixture
def shared():
    """Two items an ID for two thirds of the IDs."""
    codes = [[n // 2 % 4, n // 8, 0] for n in range(16)] + [[n % 4, n // 4, 1] for n in range(8)]
    return Catalogue.build(ITEMS, codes, SIZES)


@pytest.fixture(scope="module")
def checkpoint(catalogue, rings, tmp_path_factory):  # noqa: F811
    """A folder trained with some options and method, each once."""
    made = {}

    def train(method="nezha", **options):
        key = method, *options.items()
        if key not in made:
            made[key] = tmp_path_factory.mktemp("teacher") / "teacher"
            model, tokenizer, dtype = starting_model("scratch", catalogue, SHAPE, 3, method)
            wanted = TrainingOptions(**(FAST | {"epochs": 1, "seed": 3} | options))
            fit(model, catalogue, rings.leave_one_out(), wanted, made[key].parent / "run", write=quiet)
            save_trained(made[key], model, tokenizer, catalogue, dtype, wanted)
        return made[key]

    return train


def quiet(line):
    pass


def pieces_of(catalogue):  # noqa: F811
    """Items, and the same as numbered codes."""
    generator = np.random.default_rng(1)
    items = [generator.choice(ITEMS, length).tolist() for length in LENGTHS]
    return items, numbered(codes_of(items, catalogue), items, catalogue)


def student(catalogue, method="nezha", softmax="codes", item_tokens=24, short=False):  # noqa: F811
    """In training mode, with opinions, and item tokens of the first semantic IDs."""
    model, _, _ = starting_model("scratch", catalogue, SHAPE, 0, method, softmax)
    model.config.short_histories = short
    model.item_embeddings = ItemEmbeddings(model.config, catalogue.keys[:item_tokens], model.model.embed_tokens)
    with torch.no_grad():
        model.item_embeddings.own.weight.normal_(std=0.5)
        for weight in (one for one in model.parameters() if one.dim() > 1):
            weight.normal_(std=0.3)  # new ones give all codes about the same
    model.keys_M = torch.from_numpy(catalogue.keys.copy()) if softmax == "catalogue" else None
    return model.train()


def sasrec_teacher(catalogue, tokens, seed=0, device=CPU):  # noqa: F811
    """With random weights and opinions of its own; not trained."""
    torch.manual_seed(seed)
    options = SasRecOptions(hidden=32, layers=1, max_history=6)
    model = SasRecModel(catalogue.num_items, options)
    torch.nn.init.normal_(model.item.weight)
    return SasRecTeacher(model.to(device), options.heads, tokens, catalogue)


def taught_by(members, tokens, weight=0.5, device=CPU):
    """Teachers that were made already."""
    teachers = Teachers.__new__(Teachers)
    teachers.members, teachers.weight, teachers.codes = members, weight, Codes(tokens, device)
    return teachers


def spread(p_VI, batch):
    """Of labelled targets → of all places in rows."""
    if "labelled" not in batch:
        return p_VI
    return p_VI.new_zeros(batch["labels"].shape[0] * batch["labels"].shape[1], p_VI.shape[1]).index_copy(
        0, batch["labelled"], p_VI
    )


def by_place(pieces, targets):
    """Piece, items of history and place in the rows of every target."""
    rows, first, _ = packed([len(codes) - 1 for codes in pieces], targets)
    for piece, (row, place) in enumerate(zip(rows, first, strict=True)):
        for end in range(1, len(pieces[piece])):
            yield piece, end, targets * row + place + end - 1


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("prefix", [(), (1, 2)])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("nezha", {"item_tokens": 10}),
        ("nezha", {"short_histories": True}),
        ("nezha", {"short_histories": True, "item_tokens": 10}),
        ("ar", {}),
    ],
)
def test_a_checkpoint_says_in_rows_what_it_says_of_one_prefix(catalogue, checkpoint, method, options, prefix, multiple):  # noqa: F811
    """Of the history as it is, whatever the student's lost."""
    folder = checkpoint(method, **options)
    tokens = load_trained(folder).model.item_tokens
    students = ItemTokens(tokens.keys, tokens.first + 90, tokens.codec, tokens.offsets + 90, tokens.short)
    teachers = Teachers(TrainingOptions(teachers=(str(folder),)), students, catalogue, NO_SPLIT, CPU)
    [teacher] = teachers.members  # of another vocabulary than the student's
    teacher.prefix = prefix
    pieces = pieces_of(catalogue)[1]
    codes = [piece[:, :-1] for piece in pieces]
    dropped = {"item_tokens": tokens, "item_dropout": 0.5, "item_token_dropout": 0.5}
    own = PackedCollator(student(catalogue).config, 6, row_multiple=multiple, **dropped)
    batch = TaughtCollator.of(own, teachers, shortened(codes, tokens, 0.0))(pieces)
    assert len(batch["input_ids"]) % multiple == 0
    found = spread(teachers(batch, batch.get("labelled")).p_VI, batch)
    vectors = teacher.model.item_vectors()
    for piece, end, place in by_place(codes, 6):
        prompt = torch.tensor([prompt_token_ids(teacher.model.config, codes[piece][:end], prefix, tokens)])
        expected = (teacher.model.first_hidden(prompt)[0] @ vectors.T).softmax(0)
        torch.testing.assert_close(found[place], expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("known", [24, 5])
def test_sasrec_says_in_rows_what_it_says_of_one_prefix_and_of_an_id_all_its_items(shared, known, multiple):
    own = student(shared, item_tokens=known)
    tokens = own.item_tokens
    teacher = sasrec_teacher(shared, tokens)
    teachers = taught_by([teacher], tokens)
    items, pieces = pieces_of(shared)
    collator = PackedCollator(own.config, 6, (1, 2), 0.5, row_multiple=multiple, item_tokens=tokens)
    batch = TaughtCollator.of(collator, teachers, False)(pieces)
    found = spread(teachers(batch, batch.get("labelled")).p_VI, batch)
    rows_of = [list(shared.rows_of_index(index)) for index in range(len(shared.keys))]
    rows_of = [rows for rows, key in zip(rows_of, shared.keys, strict=True) if key in tokens.keys]
    assert max(map(len, rows_of)) == 2
    taught = sorted(row for rows in rows_of for row in rows)
    for piece, end, place in by_place(pieces, 6):
        numbers = torch.tensor([shared.rows(items[piece][:end])]) + 1
        p = teacher.model.scores(teacher.model(numbers)[0, -1]).detach()[taught].softmax(0)
        expected = [sum(float(p[taught.index(row)]) for row in rows) for rows in rows_of]
        assert found[place].tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_mean_of_several_is_taught_and_those_that_read_the_same_share_rows(catalogue, checkpoint):  # noqa: F811
    folders = [str(checkpoint()), str(checkpoint(seed=4))]
    tokens = load_trained(checkpoint()).model.item_tokens
    collator = PackedCollator(student(catalogue).config, 6, item_tokens=tokens)
    found = []
    for names in ([folders[0]], [folders[1]], folders):
        teachers = Teachers(TrainingOptions(teachers=tuple(names)), tokens, catalogue, NO_SPLIT, CPU)
        batch = TaughtCollator.of(collator, teachers, False)(pieces_of(catalogue)[1])
        assert {name.split("_")[0] for name in batch if name.startswith("teacher")} == {"teacher0"}
        found.append(teachers(batch, batch["labelled"]).p_VI)
    assert (found[0] - found[1]).abs().max() > 1e-4
    torch.testing.assert_close(found[2], (found[0] + found[1]) / 2)


def test_levels_are_taught_what_the_items_behind_the_prefix_are_given(shared):
    tokens = student(shared, item_tokens=9).item_tokens
    p_VI = torch.rand(16, 9).softmax(1)
    codes_VL = torch.from_numpy(shared.codec.codes_of_key(shared.keys)).long()
    found = Lesson(p_VI, 0.5, Codes(tokens, CPU)).of_codes(codes_VL)
    known = tokens.codec.codes_of_key(tokens.keys).tolist()
    for target, codes in enumerate(codes_VL.tolist()):
        for level, size in enumerate(SIZES):
            expected = [0.0] * size
            for item, own in enumerate(known):
                if own[:level] == codes[:level]:
                    expected[own[level]] += float(p_VI[target, item])
            assert found[level][target].tolist() == pytest.approx(expected, abs=1e-6)
    assert any(not shares.any() for shares in found[1])  # of prefixes without such an item


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("softmax", SOFTMAX_OVER)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("nezha", {"smoothing": 0.1, "levels": (3.0, 2.0, 1.0), "known": 9}),
        ("nezha", {"item_loss": 0.0, "known": 9}),
        ("nezha", {"weight": 1.0}),
        *((method, {"known": 9}) for method in METHODS if method != "nezha"),
    ],
)
def test_losses_are_those_of_the_formula(shared, method, softmax, options, multiple):
    model = student(shared, method, softmax, options.get("known", 24), short=method == "mtp")
    tokens, weight, smoothing = model.item_tokens, options.get("weight", 0.4), options.get("smoothing", 0.0)
    item_loss = options.get("item_loss", 0.3)
    model.item_loss = ItemLoss(tokens, item_loss) if item_loss else None
    model.label_smoothing, model.level_weights = smoothing, options.get("levels", ())
    teachers = taught_by([sasrec_teacher(shared, tokens), sasrec_teacher(shared, tokens, 1)], tokens, weight)
    collator = PackedCollator(model.config, 6, (1, 2), row_multiple=multiple, item_tokens=tokens)
    batch = TaughtCollator.of(collator, teachers, False)(pieces_of(shared)[1])
    plain = model(**batch)
    model.teachers = teachers
    taught = model(**batch)
    p_VI = teachers(batch, batch.get("labelled")).p_VI.double()

    labels = batch["labels"].flatten(0, 1)[batch.get("labelled", slice(None))]
    hidden = plain.hidden_states.flatten(0, 1)[batch.get("labelled", slice(None)), 0]
    items = F.linear(hidden, model.item_vectors()).double().log_softmax(1)
    known = tokens.codec.codes_of_key(tokens.keys).tolist()
    by_level, by_item, alone = [[] for _ in SIZES], [], 0
    for target, codes in enumerate(labels.tolist()):
        if codes[0] < 0:
            continue
        for level, log_p in enumerate(one[target].double() for one in plain.logits):
            true = -log_p[codes[level]]
            true = (1 - smoothing) * true - smoothing * log_p[log_p > -torch.inf].mean() if smoothing else true
            behind = [item for item, own in enumerate(known) if own[:level] == codes[:level]]
            mass = p_VI[target, behind].sum()
            soft = sum(-p_VI[target, item] / mass * log_p[known[item][level]] for item in behind)
            by_level[level].append((1 - weight) * true + weight * soft if behind else true)
            alone += not behind
        if codes in known:
            soft = -(p_VI[target] * items[target]).sum()
            by_item.append((1 - weight) * -items[target, known.index(codes)] + weight * soft)
    assert (alone > 0) == ("known" in options)
    levels = torch.tensor(model.level_weights or [1.0] * len(SIZES)).double()
    expected = sum(share * sum(losses) / len(losses) for share, losses in zip(levels, by_level, strict=True))
    expected = expected / levels.sum() + item_loss * sum(by_item) / len(by_item)
    assert taught.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert taught.loss.item() != pytest.approx(plain.loss.item(), abs=0.01)
    taught.loss.backward()
    assert all(one.grad.isfinite().all() for one in model.parameters() if one.grad is not None)
    model.eval()
    assert torch.equal(model(**batch).loss, plain.loss)  # validation is as without


def test_codes_that_no_item_has_any_more_are_not_taught():
    """A checkpoint keeps the tokens of items that left the catalogue."""
    log_p = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0], [0.5, 0.5]]).log_softmax(1).requires_grad_()
    share = torch.tensor([[0.2, 0.3], [1e-42, 0.3], [0.1, 0.0]])
    lesson = Lesson(share, 0.5, Codes(ItemTokens(np.array([0, 1]), 9, SemanticIdCodec([2]), [1]), CPU))
    found = lesson.mixed(torch.tensor([4.0, 6.0, 8.0]), log_p, share)
    torch.testing.assert_close(found, torch.tensor([2.0, 3.0, 4.0 + 0.5 * float(np.log(2))]))
    found.sum().backward()
    assert log_p.grad.isfinite().all()
    without = lesson.mixed(torch.tensor([4.0]), log_p[:1], torch.tensor([[0.0, 0.3]]))
    assert without.tolist() == [4.0]


def test_nothing_random_hangs_on_teachers_and_they_are_no_part_of_the_model(catalogue, checkpoint, tmp_path):  # noqa: F811
    folder = str(checkpoint())
    own = student(catalogue, item_tokens=24)
    own.item_embeddings = ItemEmbeddings(
        own.config, load_trained(checkpoint()).model.item_tokens.keys, own.model.embed_tokens
    )
    names, count = list(own.state_dict()), len(list(own.parameters()))
    collator = PackedCollator(own.config, 6, (), 0.3, item_tokens=own.item_tokens, item_token_dropout=0.3)
    pieces = pieces_of(catalogue)[1]
    torch.manual_seed(0)
    plain = collator([piece[:, :-1] for piece in pieces])
    state = torch.get_rng_state()
    torch.manual_seed(0)
    split = SimpleNamespace(train=[ITEMS[:4]] * 3, valid_history=[ITEMS[:2]], valid_target=ITEMS[2:3])
    teachers = Teachers(TrainingOptions(teachers=(folder, "sasrec")), own.item_tokens, catalogue, split, CPU)
    teachers.sasrecs = {digest: replace(one, epochs=1) for digest, one in teachers.sasrecs.items()}
    teachers.learn(tmp_path, quiet)
    batch = TaughtCollator.of(collator, teachers, False)(pieces)
    own.teachers = teachers
    own(**batch).loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(batch[name], values) for name, values in plain.items())
    assert list(own.state_dict()) == names
    assert len(list(own.parameters())) == count
    for teacher in teachers.members:
        assert not teacher.model.training
        assert not any(one.requires_grad or one.grad is not None for one in teacher.model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_a_taught_step_is_captured(catalogue, checkpoint, half):  # noqa: F811
    gpu, folder = torch.device("cuda"), str(checkpoint())
    own = student(catalogue).to(gpu)
    tokens = own.item_tokens
    own.item_loss = ItemLoss(tokens, 0.3).to(gpu)
    made = Teachers(TrainingOptions(teachers=(folder,)), tokens, catalogue, NO_SPLIT, gpu)
    own.teachers = taught_by([*made.members, sasrec_teacher(catalogue, tokens, device=gpu)], tokens, device=gpu)
    plain = PackedCollator(own.config, 6, (1, 2), 0.2, gpu, 4, tokens, 0.2)
    pack, pieces = TaughtCollator.of(plain, own.teachers, False), pieces_of(catalogue)[1]

    def loss_of(batch):
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            return own(**batch).loss

    steps, losses = StepGraphs(own, loss_of), set()
    for some in (pieces, [piece.flip(0) for piece in pieces], 3 * pieces):
        batch = pack(some)
        expected = loss_of(batch).item()
        losses.add(steps(batch).item())
        assert steps(batch).item() == pytest.approx(expected, rel=0.02 if half else 1e-4)
    assert len(steps.graphs) == 2
    assert len(losses) == 3
