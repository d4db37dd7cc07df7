"""The report's table of the quality of several sets of images."""

from typing import Any

from dvinv.evaluation.quality import MOST
from dvinv.report.page import Table, percent

SETS = {
    'synthesized': 'Synthesized images',
    'prior_only': 'Without the feature term',
    'noise': 'Noise',
    'real': 'Real images',
}
COLUMNS = {
    'inception_score': 'inception score',
    'frechet_distance': 'Fréchet distance',
    'kernel_distance': 'kernel distance',
    'spread': 'spread',
    'nearest': 'nearest',
}


def quality_table(results: dict[str, dict], verifier: str) -> Table:
    """Returns the table for the report, with one row per set of images.

    Args:
      results: the result of `figures_of_sets`.
      verifier: the name of the network that judged the images.
    """
    accuracies = {name: _accuracies(quality, verifier) for name, quality in results.items()}
    rows = [
        [SETS[name], *map(percent, accuracies[name].values()), *(quality[key] for key in COLUMNS)]
        for name, quality in results.items()
    ]
    caption = (
        f'On at most {MOST:,} images each. Under the name of a network: its accuracy; top 5: the class is among its first '
        f'five answers. The other columns are measured with {verifier}. Inception score: higher is better. Distances to '
        'real images: lower is better, 0 for the same images. Spread within classes: 0 if all images of a class are equal. '
        'Nearest: the cosine to the most similar other image, 1 for copies.'
    )
    return Table(('Images', *accuracies['synthesized'], *COLUMNS.values()), rows, caption=caption)


def _accuracies(quality: dict[str, Any], verifier: str) -> dict[str, float]:
    """Returns {heading of a column: accuracy on a set of images} for every verifier."""
    accuracies: dict[str, float | None] = {}
    for network, figures in {verifier: quality, **quality['verifiers']}.items():
        accuracies |= {network: figures['recognised'], f'{network}, top 5': figures['recognised_top5']}
    return {heading: accuracy for heading, accuracy in accuracies.items() if accuracy is not None}
