"""LPIPS (arXiv 1801.03924) with VGG16: a distance between images that follows what people see as alike."""

import torch
import torch.nn.functional as F
from torchvision.models import vgg16

CHANNELS = (64, 128, 256, 512, 512)  # at relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, where features are compared
EPSILON = 1e-10  # added to the norm of a feature vector, as in the published implementations


class LPIPS(torch.nn.Module):
    """LPIPS(x, y) for images (B, 1 or 3, H, W) in [0, 1], H and W at least 16; grey is repeated to three channels.

    lin_weights   path of the five vectors of channel weights: piq's lpips_weights.pt (a list of tensors), or a state dict
                  with lin0.model.1.weight ... lin4.model.1.weight (the authors' lpips package)
    vgg_weights   path of torchvision's VGG16 state dict; only its `features` are read
    pooling       "max", as VGG16 was trained, or "avg", smoother in the images

    Gradients flow to both images and never to the weights; that of a feature vector of zeros is zero.  Feature norms are
    float32 under autocast too; convolutions follow torch's own settings (autocast, TF32).

    Nothing in the files is executed.  ValueError for one of another content, OSError for one that cannot be read.
    """

    def __init__(self, lin_weights, vgg_weights, pooling="max"):
        super().__init__()
        if pooling not in ("max", "avg"):
            raise ValueError(f"pooling is {pooling!r}: it must be 'max' or 'avg'")
        with torch.device("meta"):  # no random numbers for weights that are replaced at once
            self.vgg = vgg16(weights=None).features[:-1]  # without the last pooling
        for i, layer in enumerate(self.vgg):
            if isinstance(layer, torch.nn.ReLU):
                layer.inplace = False  # a feature is read before the next layer overwrites it
            elif isinstance(layer, torch.nn.MaxPool2d) and pooling == "avg":
                self.vgg[i] = torch.nn.AvgPool2d(2)
        own, state = self.vgg.state_dict(), _read(vgg_weights)
        found = {name: state.get(f"features.{name}") for name in own} if isinstance(state, dict) else dict.fromkeys(own)
        for name, value in found.items():
            if getattr(value, "shape", None) != own[name].shape:
                raise ValueError(f"{vgg_weights} is not a state dict of torchvision's VGG16: see features.{name}")
        self.vgg.load_state_dict({name: value.float() for name, value in found.items()}, assign=True)
        for i, vector in enumerate(_lin_vectors(_read(lin_weights), lin_weights)):
            self.register_buffer(f"lin{i}", vector.detach().float().reshape(-1))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1))  # of ImageNet, as VGG16 expects
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1))
        self.requires_grad_(False)

    def features(self, x):
        """The five feature maps of images, each vector over channels divided by its norm, float32."""
        x, found = (x.expand(-1, 3, -1, -1) - self.mean) / self.std, []
        for i, layer in enumerate(self.vgg):
            x = layer(x)
            if i + 1 == len(self.vgg) or isinstance(self.vgg[i + 1], (torch.nn.MaxPool2d, torch.nn.AvgPool2d)):
                full = x.float()  # the last of its block
                found.append(full / (torch.linalg.vector_norm(full, dim=1, keepdim=True) + EPSILON))
        return found

    def forward(self, x, y):
        """Distances (B,) of x and y, both (B, 1 or 3, H, W) in [0, 1]; ValueError for other shapes and for integers."""
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 16:
            raise ValueError(
                f"images are {tuple(x.shape)} and {tuple(y.shape)}: both must be the same (B, 1 or 3, H, W), 16 pixels or more"
            )
        if not (x.is_floating_point() and y.is_floating_point()):
            raise ValueError(f"images are {x.dtype} and {y.dtype}: they must be floating-point numbers in [0, 1]")
        total = 0
        for i, (a, b) in enumerate(zip(self.features(x), self.features(y))):
            weights = getattr(self, f"lin{i}").reshape(-1, 1, 1)
            total = total + ((a - b).square() * weights).sum(1).mean((1, 2))
        return total


def at_vgg_size(x):
    """Images of fewer than 256 pixels resized to 224, the size VGG16 was trained on (bilinear), as the reference does."""
    if x.shape[-1] < 256:
        return F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False)
    return x


def _read(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever the unpickler meets in a damaged or hostile file
        raise ValueError(f"{path} is not a file of tensors, or it is damaged") from error


def _lin_vectors(content, path):
    if isinstance(content, dict):
        vectors = [content.get(f"lin{i}.model.1.weight") for i in range(5)]
    else:
        vectors = list(content) if isinstance(content, (list, tuple)) else []
    if [getattr(v, "numel", lambda: 0)() for v in vectors] != list(CHANNELS):
        expected = f"five tensors of {', '.join(map(str, CHANNELS))} numbers, in a list or named lin0.model.1.weight ..."
        raise ValueError(f"{path} does not hold LPIPS weights: expected {expected}")
    return vectors
