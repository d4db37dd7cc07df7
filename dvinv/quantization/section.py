"""The section of the report about quantized networks: accuracy against bits and megabytes."""

from dvinv.config import BITS, bits_of
from dvinv.report.charts import line_chart
from dvinv.report.page import Section, Table, Tile, percent

RUNGS = {  # figure -> its label
    'no_images_test_accuracy': 'no images',
    'minmax_test_accuracy': 'pool, all values',
    'percentile_test_accuracy': 'pool, percentile',
    'mse_test_accuracy': 'pool, least error',
    'real_test_accuracy': 'real images',
    'noise_test_accuracy': 'noise',
    'uncorrected_test_accuracy': 'uncorrected',
    'unequalised_test_accuracy': 'not equalised',
}
FINAL = 'the network in the file'


def smallest(figures: dict) -> str:
    """Returns the setting with the fewest bytes among the figures of the task."""
    return min((name for name in figures if BITS.fullmatch(name)), key=lambda setting: (figures[setting]['bytes'], setting))


def quantization_tile(figures: dict) -> Tile:
    """Returns the tile with the key figure."""
    setting = smallest(figures)
    accuracy, ratio = figures[setting]['test_accuracy'], percent(figures[setting]['bytes_ratio'], 0)
    if accuracy is None:
        return Tile(setting, ratio, "of the float network's bytes")
    return Tile(setting, percent(accuracy), f'real test accuracy in {ratio} of the bytes', accuracy)


def quantization_section(figures: dict) -> Section:
    """Returns the section for the figures of the task `quantization` in results.json."""
    settings = sorted((name for name in figures if BITS.fullmatch(name)), key=bits_of, reverse=True)
    megabytes = figures['float_bytes'] / 1e6
    rows = [
        [
            setting + (', distilled' if of['distilled'] else ''),
            f'{of["bytes"] / 1e6:.3f}',
            f'{of["bytes_ratio"]:.3f}',
            percent(of['test_accuracy']),
            percent(of['test_agreement']),
            of['test_kl'],
        ]
        for setting, of in ((setting, figures[setting]) for setting in settings)
    ]
    score = figures['float_test_accuracy']
    rows.append(
        ['float32', f'{megabytes:.3f}', '1', percent(score), *((percent(1.0), 0) if score is not None else (None, None))]
    )
    files = Table(
        ('Network', 'MB', 'of the float file', 'real test accuracy', 'agrees with float', 'KL to float'),
        rows,
        caption='Whole files. Weights (w) and inputs of layers (a) have so many bits; the first and the last layer may have '
        'more. Agreement: the share of test images that both put into one class.',
    )
    shown = {name: label for name, label in RUNGS.items() if any(name in figures[setting] for setting in settings)}
    ladder = Table(
        ('Ranges from', *settings),
        [[label, *(percent(figures[setting].get(name)) for setting in settings)] for name, label in shown.items()],
        caption='Real test accuracy by calibration alone, before any learning.',
    )
    bits = {setting: sum(bits_of(setting)) / 2 for setting in sorted(settings, key=lambda setting: sum(bits_of(setting)))}
    by_bits = {
        label: ([*bits.values()], [figures[setting].get(name) for setting in bits])
        for name, label in {'test_accuracy': FINAL, **shown}.items()
        if name not in ('minmax_test_accuracy', 'percentile_test_accuracy', 'uncorrected_test_accuracy')
    }
    by_size = (
        [*(figures[s]['bytes'] / 1e6 for s in settings), megabytes],
        [*(figures[s]['test_accuracy'] for s in settings), figures['float_test_accuracy']],
    )
    charts = [
        line_chart(by_bits, 'Accuracy against bits', 'bits, mean of weights and inputs', 'real test accuracy'),
        line_chart({FINAL: by_size}, 'Accuracy against the size of the file', 'megabytes', 'real test accuracy'),
    ]
    return Section('Quantization', quantization_sentence(figures), tables=[files, ladder], charts=charts)


def quantization_sentence(figures: dict) -> str:
    """Returns a sentence that states the result."""
    setting = smallest(figures)
    text, score = f'In {setting} the network takes {percent(figures[setting]["bytes_ratio"])} of its bytes', ''
    if (accuracy := figures[setting]['test_accuracy']) is not None:
        score = f' and reads {percent(accuracy)} of the real test images right, in float32 '
        score += percent(figures['float_test_accuracy'])
    return f'{text}{score}.'
