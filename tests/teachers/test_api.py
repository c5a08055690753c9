"""A teacher that is only an API: what it answers, counts, remembers and is allowed to ask."""

import copy
import math
import pickle
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.api_toys import OUTPUTS, WEIGHTS, inputs, logits_of, probabilities_of

from bdistil import ApiTeacher, RunError, UserError

# ---- answers


def test_logits_come_as_the_model_says(api, make):
    x = inputs(10)
    assert np.allclose(make(api)(x), x.numpy() @ WEIGHTS, atol=1e-5)
    assert api.requests == [4, 4, 2]
    # What went out is what came in, to the bit.
    assert api.answered == [row.numpy().tobytes() for row in x]


def test_probabilities_become_centred_logarithms(tmp_path):
    x, zero = inputs(5), np.array([[1.0, 0.0, 0.0, 0.0]], np.float32)
    answers = make_answers = probabilities_of(x)
    teacher = ApiTeacher(lambda batch: make_answers, OUTPUTS, tmp_path / "a", answers="probabilities", name="p")
    logits = teacher(x).numpy()
    logs = np.log(answers)
    assert np.allclose(logits, logs - logs.mean(1, keepdims=True), atol=1e-5)
    assert np.allclose(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), answers, atol=1e-6)
    sure = ApiTeacher(lambda batch: zero, OUTPUTS, tmp_path / "b", answers="probabilities", name="p")(inputs(1))
    assert sure.isfinite().all()
    assert float(sure[0, 0] - sure[0, 1]) == pytest.approx(math.log(1e7), rel=1e-4)


def test_labels_become_one_hots_of_the_length_of_a_normal_vector(make):
    teacher = make(lambda batch: logits_of(batch).argmax(1).tolist(), answers="labels")
    x = inputs(9)
    logits = teacher(x)
    assert teacher.hard
    assert torch.equal(logits.argmax(1), torch.from_numpy(logits_of(x).argmax(1)))
    assert torch.allclose(logits.norm(dim=1), torch.full((9,), math.sqrt(OUTPUTS)))
    assert sorted(logits[0].tolist()) == [0, 0, 0, math.sqrt(OUTPUTS)]


def test_answers_do_not_depend_on_the_precision_of_the_caller(make, tmp_path):
    net, x = torch.nn.Linear(6, OUTPUTS).requires_grad_(False), inputs(5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, logits = net(x), make(lambda batch: net(torch.from_numpy(batch)))(x)
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(logits, net(x), atol=1e-6)
    assert not torch.allclose(rounded.float(), net(x), atol=1e-6)
    of_bfloat16 = make(lambda batch: rounded, name="rounded", cache=tmp_path / "rounded", batch_size=8)
    assert torch.equal(of_bfloat16(x), rounded.float())


# ---- counting, the cache, the budget


def test_nothing_is_asked_twice(api, make):
    x = inputs(6)
    twice = torch.cat((x, x[:3]))
    first = make(api)
    answers = first(twice)
    assert torch.equal(answers[:3], answers[6:])
    again = make(api)  # as after a restart
    assert torch.equal(again(x.flip(0)), answers[:6].flip(0))
    assert len(api.samples) == first.queries == again.queries == 6
    again(inputs(2, seed=1))
    assert len(api.samples) == again.queries == 8


def test_inputs_of_one_content_and_two_shapes_are_two(make):
    teacher = make(lambda batch: np.zeros((len(batch), OUTPUTS)))
    teacher(torch.zeros(1, 6))
    teacher(torch.zeros(1, 2, 3))
    assert teacher.queries == 2


def test_the_budget_is_never_passed_and_nothing_is_lost(api, make):
    teacher = make(api, budget=10)
    kept = teacher(inputs(8))
    with pytest.raises(RunError, match=r"3 more would make 11, allowed are 10\..*Raise `budget`"):
        teacher(inputs(3, seed=1))
    assert teacher.queries == len(api.samples) == 8
    assert torch.equal(teacher(inputs(8)), kept)
    teacher(inputs(2, seed=1))
    assert make(api, budget=11).queries == 10


@pytest.mark.parametrize("other", [{"name": "b"}, {"answers": "probabilities"}, {"outputs": 5}], ids=str)
def test_a_cache_of_another_api_is_refused(make, other):
    make(logits_of, name="a")
    with pytest.raises(UserError, match=r"answers in .*answers\.sqlite are of another API: 'a, logits of 4 classes'"):
        make(logits_of, **{"name": "a", **other})


def test_a_file_that_is_no_cache(make, tmp_path):
    (tmp_path / "answers.sqlite").write_text("something else " * 100)
    with pytest.raises(RunError, match=r"answers\.sqlite cannot be read or written: file is not a database"):
        make(logits_of)


def test_the_cache_holds_no_pickle_and_the_teacher_can_be_copied(api, make, tmp_path):
    teacher = make(api)
    teacher(inputs(3))
    base = sqlite3.connect(tmp_path / "answers.sqlite")
    rows = np.stack([np.frombuffer(answer, np.float32) for (answer,) in base.execute("SELECT answer FROM answers")])
    base.close()
    expected = inputs(3).numpy() @ WEIGHTS
    assert np.allclose(rows[rows[:, 0].argsort()], expected[expected[:, 0].argsort()], atol=1e-5)
    for twin in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert torch.equal(twin(inputs(3)), teacher(inputs(3)))
    assert teacher.queries == 3


def test_two_at_once_ask_each_input_once(api, make):
    teachers = [make(api, batch_size=2) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda teacher: teacher(inputs(12)), teachers))
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert len(api.samples) == teachers[0].queries == 12


def test_functions_of_one_name_in_two_modules_are_two_apis(tmp_path):
    asks = []
    for module in ("v1", "v2"):
        space = {"__name__": module}
        exec("def ask(batch):\n    return batch[:, :4]", space)
        asks.append(space["ask"])
    ApiTeacher(asks[0], OUTPUTS, tmp_path / "answers.sqlite")
    with pytest.raises(UserError, match=r"are of another API: 'v1\.ask, .* there, 'v2\.ask, "):
        ApiTeacher(asks[1], OUTPUTS, tmp_path / "answers.sqlite")
