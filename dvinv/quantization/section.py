"""The section of the report about quantized networks: accuracy against bits and megabytes."""

from dvinv.config import BITS, bits_of
from dvinv.report.charts import Chart, line_chart
from dvinv.report.page import Section, Table, Tile, percent

ABLATIONS = {  # figure -> its label
    'no_images_test_accuracy': 'no images',
    'minmax_test_accuracy': 'pool, all values',
    'percentile_test_accuracy': 'pool, percentile',
    'mse_test_accuracy': 'pool, least error',
    'real_test_accuracy': 'real images',
    'noise_test_accuracy': 'noise',
    'uncorrected_test_accuracy': 'uncorrected',
    'unequalised_test_accuracy': 'not equalised',
    'per_layer_test_accuracy': 'pool, ranges per layer',
    'per_token_test_accuracy': 'pool, ranges per token',
}
FINAL = 'the network in the file'


def smallest(figures: dict) -> str:
    """Returns the setting with the fewest bytes among the figures of the task."""
    return min((name for name in figures if BITS.fullmatch(name)), key=lambda setting: (figures[setting]['bytes'], setting))


def quantization_section(figures: dict) -> Section:
    """Returns the section for the figures of the task `quantization` in results.json."""
    settings = _settings(figures)
    rows = [
        [
            setting + (', distilled' if row['distilled'] else ''),
            f'{row["bytes"] / 1e6:.3f}',
            f'{row["bytes_ratio"]:.3f}',
            percent(row['test_accuracy']),
            percent(row['test_agreement']),
            row['test_kl'],
        ]
        for setting, row in ((setting, figures[setting]) for setting in settings)
    ]
    score = figures['float_test_accuracy']
    same = (None, None) if score is None else (percent(1.0), 0)
    rows.append(['float32', f'{figures["float_bytes"] / 1e6:.3f}', '1', percent(score), *same])
    files = Table(
        ('Network', 'MB', 'of the float file', 'real test accuracy', 'agrees with float', 'KL to float'),
        rows,
        caption='Whole files. Weights (w) and inputs of layers (a) have so many bits; the first and the last layer may have '
        'more. Agreement: the share of test images that both put into one class.',
    )
    ablation = Table(
        ('Ranges from', *settings),
        [
            [label, *(percent(figures[setting].get(name)) for setting in settings)]
            for name, label in _ablations(figures).items()
        ],
        caption='Real test accuracy by calibration alone, before any learning.',
    )
    setting, sentence = smallest(figures), quantization_sentence(figures)
    accuracy, ratio = figures[setting]['test_accuracy'], percent(figures[setting]['bytes_ratio'], 0)
    tile = Tile(setting, percent(accuracy), f'real test accuracy in {ratio} of the bytes', accuracy)
    return Section(
        'Quantization',
        sentence,
        tables=[files, ablation],
        charts=[accuracy_by_bits(figures), accuracy_by_size(figures)],
        tiles=[Tile(setting, ratio, "of the float network's bytes") if accuracy is None else tile],
        summary=sentence,
    )


def accuracy_by_bits(figures: dict) -> Chart | None:
    """Draws accuracy against the mean of the bits of weights and inputs; for `figures` see `quantization_section`."""
    bits = {
        setting: sum(bits_of(setting)) / 2 for setting in sorted(_settings(figures), key=lambda name: sum(bits_of(name)))
    }
    lines = {
        label: ([*bits.values()], [figures[setting].get(name) for setting in bits])
        for name, label in {'test_accuracy': FINAL, **_ablations(figures)}.items()
        if name not in ('minmax_test_accuracy', 'percentile_test_accuracy', 'uncorrected_test_accuracy')
    }
    return line_chart(lines, 'Accuracy against bits', 'bits, mean of weights and inputs', 'real test accuracy')


def accuracy_by_size(figures: dict) -> Chart | None:
    """Draws accuracy against the size of the file in megabytes; for `figures` see `quantization_section`."""
    networks = [figures[setting] for setting in _settings(figures)]
    networks.append({'bytes': figures['float_bytes'], 'test_accuracy': figures['float_test_accuracy']})
    networks.sort(key=lambda network: network['bytes'])
    line = [network['bytes'] / 1e6 for network in networks], [network['test_accuracy'] for network in networks]
    return line_chart({FINAL: line}, 'Accuracy against the size of the file', 'megabytes', 'real test accuracy')


def _settings(figures: dict) -> list[str]:
    """Returns the settings that were measured, those with the most bits first."""
    return sorted((name for name in figures if BITS.fullmatch(name)), key=bits_of, reverse=True)


def _ablations(figures: dict) -> dict[str, str]:
    """Returns {figure: its label} for the figures of `ABLATIONS` that were measured."""
    return {
        name: label for name, label in ABLATIONS.items() if any(name in figures[setting] for setting in _settings(figures))
    }


def quantization_sentence(figures: dict) -> str:
    """Returns a sentence that states the result."""
    setting = smallest(figures)
    text, score = f'In {setting} the network takes {percent(figures[setting]["bytes_ratio"])} of its bytes', ''
    if (accuracy := figures[setting]['test_accuracy']) is not None:
        score = f' and reads {percent(accuracy)} of the real test images right, in float32 '
        score += percent(figures['float_test_accuracy'])
    return f'{text}{score}.'
