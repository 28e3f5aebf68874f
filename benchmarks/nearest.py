"""Does a model remember its training images?  Its images beside the nearest of them, and how near those are.

  python benchmarks/nearest.py --checkpoint checkpoints/mnist-characteristic.pth --dest logs/nearest.png

Distances are Euclidean, of raw pixels in [0, 1].  Test images, which the model has not seen, have them too: a model that
remembers is nearer to its training images than they are.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dist_util

import torch

import dataset
import defaults
import generator
import misc

SHOWN, NEAREST = 16, 3


def nearest(images, train, count=NEAREST):
    """Distances and indices (N, count) of the images of `train` that are nearest to `images`, uint8 (N, C, H, W)."""
    kept, train = [], train.flatten(1) / 255
    with misc.progress(len(images), "nearest") as bar:
        for part in images.split(200):
            kept.append(torch.cdist(part.flatten(1) / 255, train).topk(count, largest=False))
            bar.update(len(part))
    return (torch.cat(parts) for parts in zip(*kept))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="model to draw images from")
    parser.add_argument("--num_steps", type=int, default=1, help="steps from noise to data (default: 1)")
    parser.add_argument("--num", type=int, default=1000, help="images to measure (default: 1000)")
    parser.add_argument("--data_path", default="data", help="where the data set is (default: data)")
    parser.add_argument("--dest", required=True, help=f"PNG file: rows of an image and the {NEAREST} nearest, {SHOWN} images")
    options = parser.parse_args()
    if options.num < SHOWN:
        parser.error(f"--num is {options.num}: it must be {SHOWN} or more")
    with dist_util.session() as device:
        trained = generator.load_model(options.checkpoint, {"num_steps": options.num_steps}, device)
        flags = ({"split": split, "data_path": options.data_path} for split in ("train", "test"))
        train, test = (dataset.load(defaults.resolve(flag, trained.config).data) for flag in flags)
        train, test = train.batch(range(len(train)))[0], test.batch(range(min(options.num, len(test))))[0]
        print("| images | median distance | nearest 1 % | nearest of all |\n|---|---|---|---|")
        for name, images in (("drawn", trained.images(range(options.num))), ("test", test)):
            distance, index = nearest(images, train)
            first = distance[:, 0]
            print(
                f"| {len(images)} {name} | {first.median():.2f} | {first.quantile(0.01):.2f} | {first.min():.2f} |", flush=True
            )
            if name == "drawn":
                rows = torch.cat([images[:SHOWN, None], train[index[:SHOWN]]], 1)  # (16, 1 + 3, C, H, W)
                left, right = rows.split(SHOWN // 2)
                misc.write_grid(options.dest, torch.cat([left, right], 1).flatten(0, 1), columns=2 * (1 + NEAREST))


if __name__ == "__main__":
    dist_util.launch(main)
