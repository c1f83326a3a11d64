"""Tags sounds with Ray Data, on one machine or on many, into a new folder of Parquet files with the rows that `psla-tag` writes.

On one machine, by two workers:
    python examples/ray_tagging.py recordings/ --model results/mini/1/tagger --out tags --concurrency 2

On a cluster that `ray start` has started, from any of its machines. All have `psla_sb[ray]` installed, and see sounds, model and
output under the same names, as in a folder that they share:
    python examples/ray_tagging.py /shared/in --model /shared/tagger --out /shared/tags --address auto --concurrency 16 --gpus 1

Sounds in an object store (`s3://bucket/folder`) are read by Ray; all files there are taken for sounds. What a worker had in work
when its machine goes down is done again elsewhere. If this program itself ends early, delete its output and run it again.
"""

import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import pyarrow as pa
import ray
import ray.data

from psla_sb.dataio.containers import sounds_in
from psla_sb.inference.bulk import listed
from psla_sb.inference.map_batches import ROWS, TagBatches


def tag_all(options):
    ray.init(address=options.address, ignore_reinit_error=True)
    if "://" in options.sounds:
        sounds = ray.data.read_binary_files(options.sounds, include_paths=True)
    else:
        paths = listed(options.sounds) if options.sounds.endswith((".txt", ".csv")) else sounds_in(options.sounds)
        if not paths:
            raise SystemExit(f"{options.sounds}: no sound files there")
        names = pa.table({"path": pa.array(map(os.fsencode, paths), pa.binary())})
        # a block is what a worker is given at a time, and what is done again
        sounds = ray.data.from_arrow([names.slice(start, options.block) for start in range(0, len(names), options.block)])
    model = {"source": options.model, "what": options.what, "device": "cuda" if options.gpus else "cpu"}
    # one at first, others where cores are free: workers in all cores would wait for ever for files that nobody reads
    workers = ray.data.ActorPoolStrategy(min_size=1, max_size=options.concurrency)
    rows = sounds.map_batches(
        TagBatches,
        fn_constructor_kwargs={**model, "batch_size": options.batch_size},
        batch_size=options.block,
        compute=workers,
        num_gpus=options.gpus,
    )
    rows.write_parquet(options.out, mode="error")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("sounds", help="a folder, a list (.txt, a path a line; or an annotation, .csv), or an address (s3://)")
    parser.add_argument("--model", required=True, help="whatever psla-tag takes")
    parser.add_argument("--out", required=True, help="a folder that is not there yet")
    parser.add_argument("--what", choices=ROWS, default="tags")
    parser.add_argument("--concurrency", type=int, default=1, help="workers at most, each of which loads the model")
    parser.add_argument("--batch-size", type=int, default=16, help="windows of sounds on the device at a time")
    parser.add_argument("--block", type=int, default=256, help="sounds that a worker is given at a time")
    parser.add_argument("--gpus", type=float, default=0, help="of each worker; it may be a fraction")
    parser.add_argument("--address", help="of a cluster, such as auto (default: a cluster of this machine alone)")
    tag_all(parser.parse_args())
