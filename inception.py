"""The InceptionV3 of FID (arXiv 1706.08500): uint8 images to feature vectors.

The network of TensorFlow's 2015-12-05 graph, whose weights pytorch-fid publishes.  It differs from torchvision's in three
places: its average pools do not count the padding, the last block pools by maximum, and it knows 1,008 classes.
"""

import torch
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import inception as blocks

SIZE = 299  # pixels, what the network was trained on
FEATURES = (64, 192, 768, 2048)
PREPROCESSING = f"uint8/255, grey repeated to 3 channels, bilinear to {SIZE} (no antialias, no aligned corners), 2x - 1"


def _average(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


class _BlockA(blocks.InceptionA):
    def forward(self, x):
        b5 = self.branch5x5_2(self.branch5x5_1(x))
        b3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), b5, b3, self.branch_pool(_average(x))], 1)


class _BlockC(blocks.InceptionC):
    def forward(self, x):
        b7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), b7, twice, self.branch_pool(_average(x))], 1)


class _BlockE(blocks.InceptionE):
    pool = staticmethod(_average)

    def forward(self, x):
        b3, twice = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        wide = [self.branch3x3_2a(b3), self.branch3x3_2b(b3), self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        return torch.cat([self.branch1x1(x), *wide, self.branch_pool(self.pool(x))], 1)


class Inception(torch.nn.Module):
    """Features of uint8 images.  Always in evaluation mode, whatever train() is called on it or on its parent.

    state   state dict of pt_inception-2015-12-05-6726825d.pth, with or without the counters `num_batches_tracked`;
            ValueError, naming a few tensors, if it is another's
    fold    multiply the batch norms into the convolutions and use the channels-last layout: the same features to float
            rounding, about twice as fast on a CPU (benchmarks/scores.py)
    """

    def __init__(self, state, fold=True):
        super().__init__()
        parts = [blocks.BasicConv2d, _BlockA, blocks.InceptionB, _BlockC, blocks.InceptionD, _BlockE, None]
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            net = blocks.Inception3(num_classes=1008, aux_logits=False, inception_blocks=parts, init_weights=False)
        try:
            net.load_state_dict(dict(state), assign=True)  # a plain dict, to which torch adds the counters that are missing
        except RuntimeError as error:
            raise ValueError(" ".join(str(error).split())[:200]) from error
        net.Mixed_7c.pool = _maximum
        self.net = net.float().requires_grad_(False)
        self.train(False)
        if fold:
            for module in net.modules():
                if isinstance(module, blocks.BasicConv2d):
                    module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), torch.nn.Identity()
            net.to(memory_format=torch.channels_last)
        self.folded = fold

    def train(self, mode=True):
        return super().train(False)

    @torch.inference_mode()
    def forward(self, images, features=2048):
        """uint8 images (N, 1 or 3, H, W) -> float32 (N, features), means over positions; features one of FEATURES.

        ValueError for other images or another number of features.  Float32 throughout: no TF32, no autocast.
        """
        if features not in FEATURES:
            raise ValueError(f"features is {features}: it must be one of {FEATURES}")
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: they must be uint8 (N, 1 or 3, H, W)")
        with torch.autocast(images.device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            net, x = self.net, images.float().div(255).expand(-1, 3, -1, -1)
            x = 2 * F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=False) - 1
            if self.folded:
                x = x.contiguous(memory_format=torch.channels_last)
            x = net.maxpool1(net.Conv2d_2b_3x3(net.Conv2d_2a_3x3(net.Conv2d_1a_3x3(x))))
            if features > 64:
                x = net.maxpool2(net.Conv2d_4a_3x3(net.Conv2d_3b_1x1(x)))
            if features > 192:
                x = net.Mixed_5d(net.Mixed_5c(net.Mixed_5b(x)))
                x = net.Mixed_6e(net.Mixed_6d(net.Mixed_6c(net.Mixed_6b(net.Mixed_6a(x)))))
            if features > 768:
                x = net.Mixed_7c(net.Mixed_7b(net.Mixed_7a(x)))
            return x.mean((2, 3))
