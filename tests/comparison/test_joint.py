"""Joint training: the loss of all prefixes at once, gradients through the links, the same answers as an ensemble."""

import pytest
import torch
from helpers.toys import FEATURES, Toys, control, make_student, make_trainer, settings_for

from bdistil import ProgressiveEnsemble, Rung
from bdistil.comparison.joint import Chain, JointLedger, joint_ensemble, plan_joint
from bdistil.comparison.students import build_students, planned_rungs
from bdistil.data.loaders import indexed_loaders

LINKED = [Rung(0), Rung(2)]
SETTINGS = settings_for(3, ladder=LINKED)


@pytest.fixture
def chain():
    classes = planned_rungs(make_student, SETTINGS)
    return Chain(build_students(make_student, classes, torch.zeros(1, FEATURES)))


def test_a_chain_answers_as_the_ensemble_of_its_students(chain):
    x = torch.randn(5, FEATURES)
    expected = ProgressiveEnsemble(list(chain.students))(x)
    assert torch.allclose(chain.eval()(x), expected, atol=1e-6)
    for module in chain.students:  # in training, with the students in eval mode, the last prefix is that answer
        module.eval()
    chain.training = True
    prefixes = chain(x)
    assert prefixes.shape == (3, 5, 4)
    assert torch.allclose(prefixes[-1], expected, atol=1e-6)


def test_gradients_of_a_later_student_reach_the_first_one_through_its_links(chain):
    chain.train()
    x = torch.randn(5, FEATURES)
    chain(x)
    last = chain.students[2]
    made = [student.features(x) for student in chain.students[:2]]
    assert last.links == 2
    own = chain(x)
    (2 * own[1] - own[0]).sum().backward()  # the second student alone
    assert made[0].shape == (5, 6)
    assert chain.students[0].body[0].weight.grad.abs().sum() > 0


def train(tmp_path, *, batches=6, ladder=LINKED, **settings):
    controller, data = control(tmp_path, settings=settings_for(3, ladder=ladder, **settings)), Toys()
    boosting = controller.boosting
    plan = plan_joint(boosting, boosting.check(data))
    losses = []
    original = type(plan.module).training_step
    with indexed_loaders(data, 0, *plan.checked.parts.plans, prepare=plan.checked.parts.replace_loader):
        plan.module.training_step = lambda *a: losses.append(original(plan.module, *a)) or losses[-1]
        ledger = JointLedger(boosting, plan)
        options = {"epochs": 8, "enable_checkpointing": False, "limit_train_batches": batches}
        make_trainer(ledger, **options).fit(plan.module, data)
    return plan, [float(loss.detach()) for loss in losses], ledger.samples_seen


def test_samples_are_those_that_were_read(tmp_path):
    assert train(tmp_path / "whole")[2] == 8 * 6 * 32
    assert train(tmp_path / "limited", batches=2)[2] == 8 * 2 * 32


@pytest.mark.parametrize("loss", ["game", "prefix_kl"])
def test_joint_training_lowers_the_sum_and_gives_an_ensemble(tmp_path, loss):
    plan, losses, _ = train(tmp_path, loss=loss)
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    ensemble = joint_ensemble(plan)
    assert len(ensemble) == 3
    assert ensemble.macs == [72, 72 + 96, 72 + 96 + 120]
    assert ensemble.scale == plan.checked.parts.train.ledger.head.scale


def test_the_loss_is_the_sum_of_what_a_first_student_would_have(tmp_path):
    plan, *_ = train(tmp_path, loss="prefix_kl")
    module, target = plan.module, torch.randn(6, 4)
    prefixes, error = torch.randn(3, 6, 4), torch.zeros(6, 4)
    each = [super(type(module), module).loss(prefix - target, error, target) for prefix in prefixes]
    assert float(module.loss(prefixes - target, error, target)) == pytest.approx(float(sum(each)))


def test_students_that_cost_the_same_have_cumulative_macs(tmp_path):
    ensemble = joint_ensemble(train(tmp_path, ladder=[Rung(0)])[0])
    assert ensemble.macs == [number * ensemble.macs[0] for number in (1, 2, 3)]
