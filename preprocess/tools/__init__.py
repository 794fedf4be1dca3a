"""Small tools around the encoders: embed one prompt, decode latents to videos."""
