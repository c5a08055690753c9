"""Quality of predictions: accuracy of classification, mean average precision of multilabel tasks, R² of regression."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multilabel_average_precision
from torchmetrics.utilities import dim_zero_cat

from bdistil.utils import distributed

Task = Literal["classification", "multilabel", "regression"]


UNLABELLED = -100  # label of unlabelled samples, as in torch's cross entropy


def score_name(task: str) -> str:
    """Name of the score in the columns `val_accuracy` and `test_accuracy`.

    Example:
        >>> score_name("classification"), score_name("multilabel"), score_name("regression")
        ('accuracy', 'mean average precision', 'R²')
    """
    return {"regression": "R²", "multilabel": "mean average precision"}.get(task, "accuracy")


def given_labels(task: Task, y: Tensor | None, teacher: Tensor) -> Tensor:
    """Labels of a batch in the form that metrics expect; the teacher's predictions if it has none.

    Args:
        task: kind of task of the run.
        y: class numbers (B,), soft labels (B, L), multilabel 0 and 1 (B, L), or real numbers; None if unlabelled.
        teacher: the teacher's logits (B, L) in its own units. Without y, figures measure agreement with it.
    """
    if y is not None:
        return y
    if task == "classification":
        return teacher.argmax(-1)
    return (teacher > 0).long() if task == "multilabel" else teacher


def class_numbers(y: Tensor) -> Tensor:
    """Class numbers (B,); for soft labels (B, L), the class with the largest one."""
    return y if y.ndim == 1 else y.argmax(-1)


def class_sums(logits: Tensor, y: Tensor) -> Tensor:
    """Batch sums (..., 3): correct predictions, cross entropy in nats, and number of labelled samples.

    Args:
        logits: (..., B, L).
        y: class numbers (B,), negative for a sample without a label, or soft labels (B, L), whose largest is the class.

    Example:
        >>> class_sums(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, -100]))
        tensor([1.0000, 0.1269, 1.0000])
    """
    negative = -logits.log_softmax(-1)
    if y.ndim > 1:
        right = (logits.argmax(-1) == y.argmax(-1)).sum(-1)
        entropy, count = (negative * y).sum((-1, -2)), right.new_full(right.shape, len(y))
    else:
        labelled, chosen = y >= 0, y.clamp(min=0)
        right = ((logits.argmax(-1) == y) & labelled).sum(-1)
        of_label = negative.gather(-1, chosen.expand(logits.shape[:-1])[..., None]).squeeze(-1)
        entropy, count = (of_label * labelled).sum(-1), labelled.sum().expand(right.shape)
    return torch.stack((right.to(entropy.dtype), entropy, count.to(entropy.dtype)), -1)


class PrefixScores(Metric):
    """Accuracy and mean cross entropy of K predictors on the same samples.

    Args:
        predictors: K, for example the number of prefixes.

    Example:
        >>> scores = PrefixScores(predictors=2)
        >>> logits = torch.tensor([[[4.0, 0.0], [4.0, 0.0]], [[4.0, 0.0], [0.0, 4.0]]])
        >>> scores.update(logits, torch.tensor([0, 1]))
        >>> accuracy, entropy = scores.compute()
        >>> accuracy.tolist(), [round(value, 3) for value in entropy.tolist()]
        ([0.5, 1.0], [2.018, 0.018])
    """

    full_state_update = False
    right: Tensor
    entropy: Tensor
    samples: Tensor

    def __init__(self, predictors: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("right", "entropy"):
            self.add_state(name, torch.zeros(predictors, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Adds a batch.

        Args:
            logits: (K, B, L).
            target: class numbers (B,), negative without a label, or soft labels (B, L).
        """
        right, entropy, samples = class_sums(logits.float(), target).double().unbind(-1)
        self.right += right
        self.entropy += entropy
        self.samples += samples[0]

    def compute(self) -> tuple[Tensor, Tensor]:
        """Accuracy in 0 … 1 and mean cross entropy in nats, both (K,), or () for K = 1 as torchmetrics squeezes it."""
        return self.right / self.samples, self.entropy / self.samples


def output_sums(answers: Tensor, labels: Tensor) -> Tensor:
    """Sums over a batch for `output_figures`; sums of several batches can be added.

    Args:
        answers: (..., B, L).
        labels: (B, L).

    Returns:
        (..., 3, L + 1): squared errors, labels and squared labels of each output; the last column counts samples.

    Example:
        >>> output_sums(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [2.0]])).tolist()
        [[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]]
    """
    errors = (answers - labels).square().sum(-2)
    labelled = torch.stack((labels.sum(0), labels.square().sum(0))).expand(*errors.shape[:-1], 2, -1)
    sums = torch.cat((errors[..., None, :], labelled), -2)
    return torch.cat((sums, sums.new_full((*sums.shape[:-1], 1), len(labels))), -1)


def output_figures(sums: Tensor) -> tuple[Tensor, Tensor]:
    """R² and rms error, both (...), from the sums of `output_sums`.

    Both are means over the outputs, as in `r2_score` and `root_mean_squared_error` of scikit-learn.

    Args:
        sums: (..., 3, L + 1).

    Example:
        >>> r2, rms = output_figures(output_sums(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [2.0]])))
        >>> round(float(r2), 3), round(float(rms), 3)
        (-1.0, 0.707)
    """
    samples = sums[..., 0, -1:]
    errors, labels, squares = sums[..., :-1].unbind(-2)
    spread = squares - labels.square() / samples
    # As in scikit-learn, R² for constant labels is 1 if they are predicted exactly, otherwise 0.
    least = 16 * torch.finfo(sums.dtype).eps * squares
    r2 = torch.where(spread > least, 1 - errors / spread, (errors <= least).to(sums.dtype))
    return r2.mean(-1), (errors / samples).sqrt().mean(-1)


class PrefixErrors(Metric):
    """R² and rms error of K predictors of L real outputs on the same samples.

    Args:
        predictors: K.
        outputs: L.

    Example:
        >>> errors = PrefixErrors(predictors=2)
        >>> errors.update(torch.tensor([[[1.0], [3.0]], [[1.0], [2.0]]]), torch.tensor([1.0, 2.0]))
        >>> errors.compute()[0].tolist()
        [-1.0, 1.0]
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, predictors: int = 1, outputs: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        blank = torch.zeros(predictors, 3, outputs + 1, dtype=torch.float64)
        self.add_state("sums", blank, dist_reduce_fx="sum")

    def update(self, answers: Tensor, target: Tensor) -> None:
        """Adds a batch.

        Args:
            answers: (K, B, L).
            target: (B,) or (B, L).
        """
        self.sums += output_sums(answers.double(), target.reshape(answers.shape[1:]).double())

    def compute(self) -> tuple[Tensor, Tensor]:
        """R² and rms error, both (K,), or () for K = 1 as torchmetrics squeezes it."""
        return output_figures(self.sums)


class PrefixPrecisions(Metric):
    """Mean average precision and mean binary cross entropy of K predictors on a multilabel task of L labels.

    The mean covers labels with at least one positive sample (macro average), as torchmetrics defines it. Logits of all
    samples are kept until `compute`.

    Example:
        >>> scores = PrefixPrecisions()
        >>> scores.update(torch.tensor([[[2.0, -1.0], [-2.0, 1.0]]]), torch.tensor([[1, 0], [0, 1]]))
        >>> [round(float(figure), 3) for figure in scores.compute()]
        [1.0, 0.22]
    """

    full_state_update = False
    answers: list[Tensor]
    targets: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("answers", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, answers: Tensor, target: Tensor) -> None:
        """Adds a batch.

        Args:
            answers: logits (K, B, L).
            target: (B, L) of 0 and 1; negative where unknown.
        """
        self.answers.append(answers.detach().float().transpose(0, 1))
        self.targets.append(target.reshape(answers.shape[1:]).long())

    def rows(self, outputs: int) -> tuple[Tensor, Tensor]:
        """Logits (N, K, L) and labels (N, L) so far; (0, 1, L) and (0, L) before the first batch."""
        if not self.answers:
            return torch.zeros(0, 1, outputs), torch.zeros(0, outputs, dtype=torch.int64)
        return dim_zero_cat(self.answers), dim_zero_cat(self.targets)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean average precision in 0 … 1 and mean cross entropy in nats per output, both (K,)."""
        return precision_figures(dim_zero_cat(self.answers), dim_zero_cat(self.targets))


def precision_figures(answers: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Figures of `PrefixPrecisions` from the logits (N, K, L) and the labels (N, L) of all samples, both (K,)."""
    known = targets >= 0
    targets = torch.where(known, targets, UNLABELLED)
    entropy = F.binary_cross_entropy_with_logits(
        answers, targets.clamp(min=0).to(answers.dtype)[:, None].expand(answers.shape), reduction="none"
    )
    entropy = (entropy * known[:, None]).sum((0, 2)) / known.sum()
    with_positives = (targets == 1).any(0)  # the precision of others is undefined
    precisions = [
        multilabel_average_precision(
            _ranks(logits), targets, targets.shape[1], average="none", ignore_index=UNLABELLED, validate_args=False
        )[with_positives].mean()
        for logits in answers.unbind(1)
    ]
    return torch.stack(precisions), entropy


def _ranks(logits: Tensor) -> Tensor:
    """Ranks (N, L) of each output, in (0, 1): precision depends on them alone, and a sigmoid would saturate at 17."""
    ranks = [column.unique(return_inverse=True)[1] for column in logits.unbind(1)]
    return (torch.stack(ranks, 1).double() + 1) / (len(logits) + 2)


PrefixMetric = PrefixScores | PrefixErrors | PrefixPrecisions


def whole_figures(scores: PrefixMetric | None, outputs: int) -> tuple[float, float]:
    """Score and loss of one predictor of L outputs over all processes, of which some may have no samples.

    NaN where there is no metric.
    """
    if scores is None:
        return float("nan"), float("nan")
    if isinstance(scores, PrefixErrors):
        r2, rms = output_figures(distributed.all_sum(scores.sums))
        return float(r2.sum()), float(rms.sum())
    if isinstance(scores, PrefixPrecisions):
        precision, entropy = precision_figures(*map(distributed.all_rows, scores.rows(outputs)))
        return float(precision[0]), float(entropy[0])
    right, entropy, samples = (distributed.all_sum(x) for x in (scores.right, scores.entropy, scores.samples))
    return float(right.sum() / samples), float(entropy.sum() / samples)


def prefix_metric(task: Task, outputs: int, predictors: int = 1) -> PrefixMetric:
    """Metric for K predictors of L outputs, which counts the samples of this process only."""
    if task == "regression":
        return PrefixErrors(predictors, outputs, sync_on_compute=False)
    if task == "multilabel":
        return PrefixPrecisions(sync_on_compute=False)
    return PrefixScores(predictors, sync_on_compute=False)
