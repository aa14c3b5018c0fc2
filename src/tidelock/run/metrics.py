"""What GLUE (Wang et al., arXiv 1804.07461, table 1) measures of predicted classes and numbers.

Shapes: N examples, C classes. May import NumPy only.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def sequence_metrics(outputs_NC: NDArray[np.float32], labels_N: NDArray[np.int64 | np.float32]) -> dict[str, float]:
    """Return the measures of a head's outputs: of classes, or where C is 1 of a number.

    Of two classes 1 is the positive one. The means of two are what GLUE reports for MRPC and STS-B. A correlation with
    what does not vary is 0 here; it has no value.
    """
    if outputs_NC.shape[1] == 1:
        predicted, numbers = outputs_NC[:, 0].astype(np.float64), labels_N.astype(np.float64)
        pearson, spearman = _pearson(predicted, numbers), _pearson(_ranks(predicted), _ranks(numbers))
        return {"pearson": pearson, "spearman": spearman, "mean_of_pearson_and_spearman": (pearson + spearman) / 2}
    classes, labels = outputs_NC.argmax(1), labels_N.astype(np.int64)
    accuracy = float((classes == labels).mean())
    measures = {"accuracy": accuracy, "matthews": _matthews(classes, labels, outputs_NC.shape[1])}
    if outputs_NC.shape[1] == 2:
        f1 = _f1(classes, labels)
        measures |= {"f1": f1, "mean_of_accuracy_and_f1": (accuracy + f1) / 2}
    return measures


def _f1(classes: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Return the harmonic mean of precision and recall of class 1; 0 where none is predicted or there."""
    positives = int((classes == 1).sum() + (labels == 1).sum())
    return 2 * int(((classes == 1) & (labels == 1)).sum()) / positives if positives else 0.0


def _matthews(classes: NDArray[np.int64], labels: NDArray[np.int64], num_classes: int) -> float:
    """Return Matthews' correlation coefficient, for any number of classes (Gorodkin 2004, R_K)."""
    predicted, true = (np.bincount(values, minlength=num_classes).astype(float) for values in (classes, labels))
    total, right = len(labels), float((classes == labels).sum())
    spread = (total**2 - predicted @ predicted) * (total**2 - true @ true)
    return float((right * total - predicted @ true) / math.sqrt(spread)) if spread > 0 else 0.0


def _pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = a - a.mean(), b - b.mean()
    # Each for itself, so that no product of small squares becomes 0.
    spread = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(a @ b) / spread if spread > 0 else 0.0


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    highest = counts.cumsum()
    mean: NDArray[np.float64] = (highest - (counts - 1) / 2)[inverse]
    return mean
