"""The U-Net and the preconditioned denoiser built on it.

`UNet` is the score network of Song et al. (arXiv 2011.13456) in its DDPM++ and NCSN++ forms, with the state-dict names
that EDM (arXiv 2206.00364) made common, so that published checkpoints load.  A second time, `s`, enters through layers
of its own (`map_layer0_s`, `map_layer1_s`, `affine_s`): with them the network is the flow map's.

`Denoiser` wraps a `UNet` F in the preconditioning of sde.py and is what everything else calls.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import sde

ARCHITECTURES = {
    # name: (embedding of time, width of that embedding in model_channels, taps of the resampling filter, residual encoder)
    "ddpmpp": ("positional", 1, (1, 1), False),
    "ncsnpp": ("fourier", 2, (1, 3, 3, 1), True),
}


class PositionalEmbedding(nn.Module):
    """(B,) times to (B, channels): sines, then cosines, of frequencies 1 down to 1/10000."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, t):
        half = self.channels // 2
        freqs = 10000.0 ** -(torch.arange(half, device=t.device, dtype=torch.float32) / (half - 1))
        angles = t.float()[:, None] * freqs
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class FourierEmbedding(nn.Module):
    """(B,) times to (B, channels): sines, then cosines, of fixed random frequencies, kept in the state dict."""

    def __init__(self, channels, scale=16.0):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, t):
        angles = t.float()[:, None] * (2 * math.pi * self.freqs.float())
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResampleConv(nn.Conv2d):
    """Convolution that also halves ("down") or doubles ("up") the resolution with a separable low-pass filter.

    With `filter_last` the filter follows the convolution (the residual encoder of NCSN++); otherwise it comes first.
    """

    def __init__(self, cin, cout, kernel, direction, taps, filter_last=False):
        super().__init__(cin, cout, kernel, padding=kernel // 2)
        taps = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer("resample_filter", (torch.outer(taps, taps) / taps.sum() ** 2)[None, None])
        self.direction, self.filter_last = direction, filter_last

    def resample(self, x, padding):
        channels, size = x.shape[1], self.resample_filter.shape[-1]
        if size == 2 and self.direction == "down":  # two equal taps: the same numbers, from faster kernels
            return F.avg_pool2d(x, 2)
        if size == 2:  # not F.interpolate, whose compiled backward pass adds one number at a time
            return x[..., :, None, :, None].expand(-1, -1, -1, 2, -1, 2).reshape(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        kernel = self.resample_filter.to(x.dtype).expand(channels, 1, size, size)
        if self.direction == "down":
            return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)

    def forward(self, x):
        border = (self.resample_filter.shape[-1] - 1) // 2
        if not self.filter_last:
            return super().forward(self.resample(x, padding=border))
        # The filter's padding is given to the convolution, so that the border is filtered as the interior is.
        x = F.conv2d(x, self.weight, self.bias, padding=self.padding[0] + border)
        return self.resample(x, padding=0)


def dropout(x, p):
    """F.dropout in training, with p to 16 bits.

    Drawing its mask takes F.dropout a fifth of a step on a CPU.  Here four elements share a random number of 64 bits.
    """
    least = round(p * 2**16)
    if not 0 < least < 2**16 or x.device.type != "cpu":
        return F.dropout(x, p)
    bits = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),))
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= least - 2**15
    return x * kept.to(x.dtype).div_(1 - least / 2**16)


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class UNetBlock(nn.Module):
    """Residual block: two convolutions, the times' embeddings added between them, then (optionally) self-attention."""

    def __init__(self, cin, cout, emb, dropout, two_times, direction=None, taps=(1, 1), attention=False):
        super().__init__()
        self.in_channels = cin
        resampling = partial(ResampleConv, cin, cout, direction=direction, taps=taps)
        self.norm0 = group_norm(cin)
        self.conv0 = resampling(3) if direction else nn.Conv2d(cin, cout, 3, padding=1)
        self.affine = nn.Linear(emb, cout)
        self.affine_s = nn.Linear(emb, cout) if two_times else None
        self.norm1 = group_norm(cout)
        self.dropout = dropout
        self.conv1 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = resampling(1) if direction else nn.Conv2d(cin, cout, 1) if cin != cout else None
        self.norm2 = group_norm(cout) if attention else None
        self.qkv = nn.Conv2d(cout, 3 * cout, 1) if attention else None
        self.proj = nn.Conv2d(cout, cout, 1) if attention else None

    def forward(self, x, emb, emb_s):
        shift = self.affine(emb)
        if self.affine_s is not None:
            shift = shift + self.affine_s(emb_s)
        h = self.conv0(F.silu(self.norm0(x))) + shift[:, :, None, None]
        h = F.silu(self.norm1(h))
        if self.training:
            h = dropout(h, self.dropout)
        x = (self.conv1(h) + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.qkv is not None:
            b, c, height, width = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(b, 1, c, 3, height * width).transpose(2, 4).unbind(3)
            a = F.scaled_dot_product_attention(q, k, v).reshape(b, height * width, c).transpose(1, 2)
            x = (self.proj(a.reshape(b, c, height, width)) + x) * math.sqrt(0.5)
        return x


class UNet(nn.Module):
    """Raw network F(x, noise, [noise_s], [label]); defaults.Network says what its settings mean.

    The resolution, height and width, is divisible by 2**(len(channel_mult) - 1).  `two_times`: with the second time's layers.
    """

    def __init__(
        self,
        img_resolution,
        img_channels,
        architecture="ddpmpp",
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        channel_mult_emb=4,
        num_blocks=4,
        attn_resolutions=(16,),
        dropout=0.1,
        label_dim=0,
        label_dropout=0.0,
        two_times=False,
    ):
        super().__init__()
        embedding, noise_mult, taps, residual = ARCHITECTURES[architecture]
        emb, noise_channels = model_channels * channel_mult_emb, model_channels * noise_mult
        self.label_dropout = label_dropout
        self.map_noise = (PositionalEmbedding if embedding == "positional" else FourierEmbedding)(noise_channels)
        self.map_label = nn.Linear(label_dim, noise_channels) if label_dim else None
        self.map_layer0 = nn.Linear(noise_channels, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        if two_times:
            self.map_layer0_s = nn.Linear(noise_channels, emb)
            self.map_layer1_s = nn.Linear(emb, emb)
        self.two_times = two_times

        block = partial(UNetBlock, emb=emb, dropout=dropout, two_times=two_times, taps=taps)
        resolutions = [img_resolution >> level for level in range(len(channel_mult))]
        widths = [model_channels * mult for mult in channel_mult]
        self.enc = nn.ModuleDict()
        skips = []  # channels of the encoder's outputs, which the decoder takes back in reverse
        channels, aux = model_channels, img_channels
        for level, (res, width) in enumerate(zip(resolutions, widths)):
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = nn.Conv2d(img_channels, channels, 3, padding=1)
            else:
                self.enc[f"{res}x{res}_down"] = block(channels, channels, direction="down")
                if residual:
                    name = f"{res}x{res}_aux_residual"
                    self.enc[name] = ResampleConv(aux, channels, 3, "down", taps, filter_last=True)
                    aux = channels
            skips.append(channels)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(channels, width, attention=res in attn_resolutions)
                channels = width
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, (res, width) in reversed(list(enumerate(zip(resolutions, widths)))):
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(channels, channels)
            else:
                self.dec[f"{res}x{res}_up"] = block(channels, channels, direction="up")
            for i in range(num_blocks + 1):
                attention = i == num_blocks and res in attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = block(channels + skips.pop(), width, attention=attention)
                channels = width
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = group_norm(channels)
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = nn.Conv2d(channels, img_channels, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self):
        """Glorot-uniform weights, zero biases; the ends of residual branches near zero, those of the s-branch at zero."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                last = name.rsplit(".", 1)[-1]
                gain = 1e-5 if last in ("conv1", "proj") or last.endswith("aux_conv") else 1.0
                gain = math.sqrt(0.2) if last == "qkv" else gain
                nn.init.xavier_uniform_(module.weight, gain)
                nn.init.zeros_(module.bias)
                if last == "affine_s":  # a fresh s-branch changes nothing
                    nn.init.zeros_(module.weight)

    def forward(self, x, noise, noise_s=None, label=None):
        """(B, C, H, W) images, (B,) times in network units, labels -> (B, C, H, W).

        Labels are class numbers (B,) or one-hot (B, label_dim); ValueError where a network with classes gets none.
        """
        return self.output(self.features(x, noise, noise_s, label))

    @property
    def output(self):
        """The output convolution, where `adaptive_weight` compares gradients."""
        return list(self.dec.values())[-1]

    def features(self, x, noise, noise_s=None, label=None):
        """What the output convolution gets."""
        class_emb = 0.0  # joins the embedding of each time
        if self.map_label is not None:
            classes = self.map_label.in_features
            if label is None:
                raise ValueError(f"this network has {classes} classes: give it `label`, numbers (B,) or one-hot (B, {classes})")
            if label.ndim == 1 and not label.is_floating_point():
                label = F.one_hot(label.long(), classes)
            if self.training and self.label_dropout:
                label = label * (torch.rand(len(label), 1, device=label.device) >= self.label_dropout)
            class_emb = self.map_label(label.to(x.dtype) * math.sqrt(classes))
        emb = self.map_noise(noise).to(x.dtype) + class_emb
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        emb_s = None
        if self.two_times:
            emb_s = self.map_noise(noise_s).to(x.dtype) + class_emb
            emb_s = F.silu(self.map_layer1_s(F.silu(self.map_layer0_s(emb_s))))

        skips, aux = [], x
        for name, layer in self.enc.items():
            if "aux_residual" in name:
                x = skips[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
            else:
                x = layer(x, emb, emb_s) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        *blocks, norm, _ = self.dec.values()
        for block in blocks:
            if x.shape[1] != block.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb, emb_s)
        return F.silu(norm(x))


class Denoiser(nn.Module):
    """Preconditioned network: D(x, t [, s] [, label]) = c_skip x + c_out F(c_in x, c_noise [, M s] [, label]).

    D(x, t) is E[X0 | Xt = x], and D(x, t, s) its average over [s, t], along which the flow map G(x, t, s) transports x.
    `sigma_data` is the data's standard deviation.  c_noise is M t, or ln(beta/alpha)/4 for `time_input` "log_snr": with it this
    is EDM's denoiser, D(x, t) = D_EDM(x/alpha, beta/alpha).  `net`'s state dict is what checkpoints hold.
    The net alone is computed in `precision`, "fp32", "tf32" or "bf16"; the rest in the dtype of x.
    """

    def __init__(self, net, sigma_data=1.0, M=999.0, time_input="t", precision="fp32"):
        super().__init__()
        self.net, self.sigma_data, self.M, self.time_input, self.precision = net, sigma_data, M, time_input, precision

    def at(self, precision):
        """The same network in another precision."""
        return Denoiser(self.net, self.sigma_data, self.M, self.time_input, precision)

    def forward(self, x, t, s=None, label=None):
        """x (B, C, H, W), t and s (B,) in [0, 1], label numbers (B,) or one-hot (B, label_dim) -> (B, C, H, W)."""
        c_in, c_skip, c_out = (sde.like(c, x) for c in sde.preconditioning(t, self.sigma_data))
        times = [self.M * t if self.time_input == "t" else sde.log_sigma(t) / 4]
        times += [] if s is None else [self.M * s]  # of which s = 0 is the most important
        # Not restored afterwards: the backward pass looks at them too.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.precision != "fp32"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            out = self.net(c_in * x, *times, label=label)
        return c_skip * x + c_out * out.to(x.dtype)

    def flow_map(self, x, t, s, label=None):
        """G(x, t, s), the solution at s of the teacher's ODE from x at t (two-time networks only); shapes as above."""
        return sde.transport(x, self(x, t, s, label), t, s)


def compile_in_place(net):
    """Compile a UNet but for its output convolution: gradients there alone would take a whole backward pass of compiled code.

    Its state dict keeps its names.  On a CPU, dropout keeps torch's generator: inductor's is slower.  On a GPU, inductor would
    keep the standard layout of a U-Net, and cuDNN change it before and after each convolution.
    """
    on_cpu = next(net.parameters()).device.type == "cpu"
    options = {"fallback_random": on_cpu, "force_layout_optimization": not on_cpu}
    net.features = torch.compile(net.features, dynamic=False, options=options)


def fastest_precision(device):
    """bf16 where the device computes in it, measured in docs/speed.md; else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def start_from_teacher(student, teacher):
    """Copy a denoiser's UNet into a two-time UNet whose s-branch then adds exactly nothing: G is one teacher step."""
    state = teacher.state_dict()
    ends = {name: torch.zeros_like(value) for name, value in student.state_dict().items() if ".affine_s." in name}
    embedding = {name.replace(".", "_s.", 1): value for name, value in state.items() if name.startswith("map_layer")}
    student.load_state_dict({**state, **embedding, **ends})
