"""Training of teachers: what the progress bar says of them."""

import torch
from helpers.toys import make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bdistil.teachers.training import TeacherSpec, TeacherTraining


def test_unknown_labels_do_not_count_in_the_accuracy():
    """The first label of the only sample is right, the second one unknown."""
    network = nn.Linear(2, 2)
    with torch.no_grad():
        network.weight.copy_(torch.eye(2))
        network.bias.zero_()
    items = TensorDataset(torch.tensor([[1.0, 1.0]]), torch.tensor([[1, -100]]), torch.arange(1))
    trainer = make_trainer()
    trainer.validate(TeacherTraining(TeacherSpec(network), "multilabel"), DataLoader(items), verbose=False)
    assert trainer.callback_metrics["teacher accuracy"] == 1.0
