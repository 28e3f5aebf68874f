"""What a classifier says of a model's images.

  python benchmarks/classes.py --checkpoint CKPT --num_steps 1
  python benchmarks/classes.py --checkpoint CKPT --num_steps 20 --guidance 0 1 1.5 2 3 --dest logs/guidance.png

Of a model with classes: the share of images that it recognises, and their pixel FID.  Of a model without: the share that it is
sure of (a class has a probability of 0.9 or more), and the Fréchet distance of its features to all training images; the same of
as many real images that it has not seen.

The classifier is a small convolutional network, trained here on the training images of the checkpoint's data set (the digits:
on all but every fifth).  Its accuracy on images that it has not seen comes first: what it says of drawn images is worth no
more.  Each class gets the same number of images, of other seeds.  With several values of --guidance the two scores are drawn.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dist_util

import torch
import torch.nn.functional as F
from torch import nn

import dataset
import defaults
import fid
import generator
import misc


def real_images(config):
    """Uint8 images (N, C, H, W) and labels (N,): all of the data, those to train a classifier on, and those to test it on."""
    train = dataset.load(config.data)
    everything = train.batch(list(range(len(train))))
    if config.data.data_name != "digits":
        test = dataset.load(defaults.resolve({"split": "test"}, config).data)
        return everything, everything, test.batch(list(range(len(test))))
    held = torch.arange(len(train)) % 5 == 0
    return everything, tuple(part[~held] for part in everything), tuple(part[held] for part in everything)


def classifier(images, labels, epochs, device):
    """A function of uint8 images (N, C, H, W) that gives features (N, 1024) and probabilities of classes, on the CPU."""
    torch.manual_seed(0)
    channels, classes = images.shape[1], int(labels.max()) + 1
    blocks = [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    blocks += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    features, last = nn.Sequential(*blocks), nn.Linear(1024, classes)
    net = nn.Sequential(features, nn.Dropout(0.3), last).to(device)
    optim = torch.optim.AdamW(net.parameters(), lr=2e-3)
    steps = epochs * len(images) // 128
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, 2e-3, total_steps=steps)
    with misc.progress(steps * 128, "classifier") as bar:
        for _ in range(steps):
            i = torch.randint(len(images), (128,))
            x, y = dataset.to_model(images[i].to(device), True), labels[i].to(device)
            optim.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optim.step()
            schedule.step()
            bar.update(128)
    net.eval()

    @torch.no_grad()
    def look(images):
        found = [features(dataset.to_model(part.to(device), True)) for part in images.split(500)]
        return torch.cat(found).cpu(), torch.cat([last(x).softmax(1) for x in found]).cpu()

    return look


def without_classes(trained, look, everything, test, num):
    """Prints a row for drawn images and one for real ones."""

    def statistics(features):
        return fid.Statistics(features.double().mean(0).numpy(), features.double().T.cov().numpy(), {})

    reference = statistics(look(everything)[0])
    print("| images | Fréchet distance of features | sure |\n|---|---|---|")
    real = test[:: max(len(test) // num, 1)][:num]  # from all over the set, whose first half is easier
    for name, images in (("real, not seen", real), ("drawn", trained.images(range(num)))):
        features, probabilities = look(images)
        score, sure = fid.frechet_distance(reference, statistics(features)), (probabilities.amax(1) >= 0.9).float().mean()
        print(f"| {len(images)} {name} | {score:.3f} | {100 * sure:.2f} % |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="model to draw images from")
    parser.add_argument("--num_steps", type=int, default=1, help="steps from noise to data (default: 1)")
    parser.add_argument("--ode_solver", help="of a denoiser (default: the checkpoint's)")
    parser.add_argument("--time_grid", help="of a denoiser (default: the checkpoint's)")
    parser.add_argument("--precision", default="fp32", help="of the network (default: fp32)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="of a denoiser (default: 1, none)")
    parser.add_argument("--num", type=int, default=1000, help="images of each class, or in all (default: 1000)")
    parser.add_argument("--epochs", type=int, default=5, help="of the classifier (default: 5; the digits need 60)")
    parser.add_argument("--data_path", default="data", help="where the data set is (default: data)")
    parser.add_argument("--dest", help="PNG file for the scores against guidance")
    options = parser.parse_args()
    if min(options.num, options.epochs) < 1:
        parser.error("--num and --epochs must be 1 or more")
    with dist_util.session() as device:
        names = ("num_steps", "data_path", "ode_solver", "time_grid", "precision")
        flags = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
        trained = generator.load_model(options.checkpoint, flags, device)
        if options.guidance != [1.0]:
            if trained.is_flow_map:
                parser.error("a flow map has the guidance of its training: leave --guidance out")
            generator.check_guidance(trained)
        everything, train, test = real_images(trained.config)
        look = classifier(*train, options.epochs, device)
        right = look(test[0])[1].argmax(1) == test[1]
        print(f"classifier: {100 * right.float().mean():.2f} % of {len(right)} real images it has not seen\n")
        if not trained.config.network.label_dim:
            without_classes(trained, look, everything[0], test[0], options.num)
            return
        extract, classes = fid.load_features("pixels", device), trained.config.network.label_dim
        reference, rows = fid.measure(everything[0], extract), []
        print("| guidance | pixel FID | recognised |" + "".join(f" {i} |" for i in range(classes)))
        print("|---|---|---|" + "---|" * classes)
        for w in options.guidance:
            images = [
                trained.sampled(guidance=w, class_idx=i).images(range(i * options.num, (i + 1) * options.num))
                for i in range(classes)
            ]
            shares = [float((look(part)[1].argmax(1) == i).float().mean()) for i, part in enumerate(images)]
            score, share = fid.frechet_distance(reference, fid.measure(torch.cat(images), extract)), sum(shares) / classes
            rows.append((w, score, share))
            line = "".join(f" {100 * value:.1f} |" for value in shares)
            print(f"| {w:g} | {score:.3f} | {100 * share:.2f} % |{line}", flush=True)
    if options.dest:
        figure, axes = misc.new_figure(2, 7, 2.8)
        for ax, values, title in zip(axes, list(zip(*rows))[1:], ("pixel FID", "share recognised")):
            ax.plot([row[0] for row in rows], values, "o-")
            ax.set(title=title, xlabel="guidance w")
        misc.write_figure(options.dest, figure)


if __name__ == "__main__":
    dist_util.launch(main)
