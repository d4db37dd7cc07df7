"""The section of the report about pruning: scores, accuracy against cost, and layer widths before and after."""

from collections.abc import Mapping, Sequence

from dvinv.report.charts import Chart, bars, line_chart
from dvinv.report.page import Section, Table, Tile, number, percent
from dvinv.runtime.workdir import Workdir

NAMES = {
    'test_accuracy': 'Synthesized images',
    'real_test_accuracy': 'Real training images (upper control)',
    'prior_only_test_accuracy': 'Images without the feature term',
    'noise_test_accuracy': 'Noise images',
    'magnitude_test_accuracy': 'Synthesized images, removed by magnitude',
    'random_test_accuracy': 'Synthesized images, removed by chance',
    'untuned_test_accuracy': 'No fine-tuning',
    'unpruned_test_accuracy': 'The whole network',
}
RATIOS = {
    'flops_ratio': 'FLOPs',
    'parameters_ratio': 'Parameters',
    'filters_ratio': 'Filters',
    'latency_ratio': 'Latency, measured',
    'predicted_latency_ratio': 'Latency, by the table of layers',
}


def pruning_section(workdir: Workdir, found: dict) -> Section:
    """Returns the section for the figures of the task and the file pruning.json."""
    story = workdir.read_json('pruning.json', {'steps': [], 'widths': {}})
    names, competing = {**NAMES}, found.get('adaptive_images')
    if competing:
        names['test_accuracy'] += f', and {competing:,} more made in competition with it'
    scores = Table(
        ('Pruned and fine-tuned on', 'real test accuracy'),
        [[name, percent(found[key])] for key, name in names.items() if found[key] is not None],
        highlight=0,
        caption=f'As many removals and, but for the untuned, {found["updates"]:,} updates each; the last, never the best.',
    )
    costs = Table(
        ('Pruned over whole', 'share'),
        [[name, number(found[key])] for key, name in RATIOS.items() if found[key] is not None],
        caption=f'{found["parameters"]:,} parameters are left.',
    )
    accuracy, sentence = found['test_accuracy'], pruning_sentence(found)
    note = f'real test accuracy with {percent(found["flops_ratio"], 0)} of the FLOPs'
    return Section(
        'Pruning',
        sentence,
        tables=[scores, costs],
        charts=[accuracy_by_flops(story['steps']), channels_left(story['widths'])],
        tiles=[Tile('Pruned', percent(accuracy), note, accuracy)],
        summary=sentence,
    )


def accuracy_by_flops(steps: Sequence[dict]) -> Chart | None:
    """Draws the accuracy after each step against the FLOPs that are left; `steps` are those in pruning.json."""
    known = [step for step in steps if step['test_accuracy'] is not None]
    curve = [step['flops_ratio'] for step in known], [step['test_accuracy'] for step in known]
    return line_chart({'Pruned network': curve}, 'Accuracy after each step', 'FLOPs left', 'real test accuracy')


def channels_left(widths: Mapping[str, Sequence[int]]) -> Chart:
    """Draws the channels of each layer before and after; `widths` are those in pruning.json."""
    return bars(
        {layer: (before, after) for layer, (before, after) in widths.items()}, 'Channels that layers make', 'channels'
    )


def pruning_sentence(found: dict) -> str:
    """Returns a sentence that states the result."""
    flops, parameters = (percent(found[name], 0) for name in ('flops_ratio', 'parameters_ratio'))
    text = f'With {flops} of its FLOPs and {parameters} of its parameters '
    if found['test_accuracy'] is None:
        return f'{text}left, the network was fine-tuned on synthesized images alone.'
    before = percent(found['unpruned_test_accuracy'])
    return f'{text}left, the network reads {percent(found["test_accuracy"])} of the real test images right, {before} before.'
