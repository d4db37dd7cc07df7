"""How much faster a pruned network is than the whole one, measured in turns, beside what the table of its layers predicts.

    python benchmarks/pruned_latency.py --network DIR/networks/pruned.safetensors [--multiple 8] [--batches 1 128]

`DIR` is a work directory of the task pruning. The two take turns; the ratio is the median over rounds, with the interval
that holds it with 95% confidence. The last line is a JSON object. A few minutes on 2 cores, most for the table.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from paired import median_interval

from dvinv.networks import classifier_of, initialise, load_network, module_of
from dvinv.networks.channel_groups import find_channels
from dvinv.networks.suited import suited_to
from dvinv.pruning.selection import measure_latencies, predicted_latency, timed
from dvinv.runtime.errors import DvinvError

tell = functools.partial(print, file=sys.stderr, flush=True)  # stdout is for the result


def main() -> None:
    """Measure, and print a line a batch size and the JSON line; a mistake ends in a sentence and status 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--network', type=Path, required=True, help='the file of a pruned network')
    parser.add_argument('--batches', type=int, nargs='+', default=[1, 128])
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument(
        '--multiple', type=int, default=1, help='pruning.round_to of that run: widths of the table are multiples of it'
    )
    arguments = parser.parse_args()
    if min(*arguments.batches, arguments.rounds, arguments.multiple) < 1:
        parser.error('--batches, --rounds and --multiple must be at least 1')
    try:
        found = {size: measure(arguments.network, size, arguments.rounds, arguments.multiple) for size in arguments.batches}
    except DvinvError as error:
        sys.exit(f'pruned_latency: {error}')
    for size, one in found.items():
        ratio, low, high, foretold = (one[key] for key in ('ratio', 'low', 'high', 'predicted'))
        print(f'Batch {size}: {ratio:.3f} of the time ({low:.3f} to {high:.3f}); predicted {foretold:.3f}.')
    print(json.dumps({str(size): one for size, one in found.items()}))


def measure(path: Path, batch_size: int, rounds: int, multiple: int) -> dict:
    """Pruned over whole: the measured ratio with its interval, the predicted one, and seconds of the whole network."""
    variables, about = load_network(path)
    if not about.get('kept'):
        raise DvinvError(f'{path} holds a network that has lost no channels; name one that the task pruning made.')
    whole = {name: value for name, value in about.items() if name != 'kept'}
    module = module_of(whole)
    channels = find_channels(module, tuple(about['image_shape']))
    tell(f'Measuring the table of layers, batch {batch_size} ...')
    price = predicted_latency(channels, measure_latencies(channels, batch_size, multiple))
    keep = channels.keep_mask(about['kept'])
    networks = (
        classifier_of(module, initialise(module, jax.random.key(0), tuple(about['image_shape'])), whole),
        classifier_of(module_of(about), variables, about),
    )
    x = jnp.zeros((batch_size, *about['image_shape']), jnp.float32)
    runs = [
        (jax.jit(suited_to(jax.default_backend(), one.apply_fn)), (jax.device_put(one.variables), x)) for one in networks
    ]
    for run, args in runs:
        timed(run, args)  # compiles
    tell('Taking turns ...')
    seconds = np.array([[timed(run, args) for run, args in runs] for _ in range(rounds)])
    ratio, low, high = median_interval((seconds[:, 1] / seconds[:, 0]).tolist())
    return {
        'ratio': round(ratio, 4),
        'low': round(low, 4),
        'high': round(high, 4),
        'predicted': round(price.total(keep) / price.total(np.ones_like(keep)), 4),
        'seconds': round(float(np.median(seconds[:, 0])), 6),
    }


if __name__ == '__main__':
    main()
