"""Fine-tune the decoder of a codec for a few steps: better audio from the same codes.

    python examples/fine_tune.py --steps 20 --out tuned

The encoder and the quantizer stay frozen, so that token files made before stay valid. Codes are computed once;
`decode_latent` is differentiable, and each step takes a random second of the clip. The loss is the multi-scale mel
distance alone. A real run wants hours of speech and discriminators: that is `fastmimi train`, see the README.
"""

import argparse
from pathlib import Path

import soundfile
import soxr
import torch

import fastmimi
from fastmimi.train.losses import mel_distance

CLIP = Path(fastmimi.__file__).parent / "assets" / "198-209-0000.ogg"
CONTEXT, LEARNED = 4, 12  # frames that the decoder sees before the loss begins; frames (80 ms) of the loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", nargs="?", type=Path, default=CLIP, help="mono speech; by default a bundled clip")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--out", type=Path, default=Path("tuned"), help="directory for config.json and the weights")
    args = parser.parse_args()
    torch.manual_seed(0)
    mimi = fastmimi.load("demo")
    samples, rate = soundfile.read(args.audio, dtype="float32")
    audio = torch.from_numpy(soxr.resample(samples, rate, mimi.sample_rate))[None, None]  # [1, 1, samples]
    audio = audio[..., : audio.shape[-1] // mimi.frame_size * mimi.frame_size]  # whole frames

    mimi.requires_grad_(False)
    trained = [mimi.upsample, mimi.decoder_transformer, mimi.decoder]
    parameters = [parameter for module in trained for parameter in module.requires_grad_().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.5, 0.9))
    codes = mimi.encode(audio)  # [1, K, T]
    latents = mimi.dequantize(codes)  # [1, hidden, T]
    print(f"{sum(parameter.numel() for parameter in parameters) / 1e6:.1f} million parameters are trained")

    def distance() -> float:
        """Mel distance over the whole clip."""
        with torch.no_grad():
            return mel_distance(audio, mimi.decode(codes), mimi.sample_rate).item()

    before, frames, size = distance(), CONTEXT + LEARNED, mimi.frame_size
    for step in range(args.steps):
        starts = torch.randint(latents.shape[-1] - frames + 1, (args.batch,)).tolist()
        batch = torch.cat([latents[..., start : start + frames] for start in starts])  # [B, hidden, frames]
        wanted = torch.cat([audio[..., start * size : (start + frames) * size] for start in starts])
        decoded = mimi.decode_latent(batch)  # [B, 1, frames * 1920]
        skip = CONTEXT * size
        loss = mel_distance(wanted[..., skip:], decoded[..., skip:], mimi.sample_rate)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        print(f"step {step + 1}: mel distance {loss.item():.4f}")
    print(f"mel distance of the whole clip: {before:.4f} before, {distance():.4f} after")

    fastmimi.save_pretrained(mimi, args.out)
    tuned = fastmimi.load(args.out)
    print(f"saved in {args.out}; codes unchanged: {torch.equal(tuned.encode(audio), codes)}")


if __name__ == "__main__":
    main()
