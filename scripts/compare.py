"""An AR and a diffusion checkpoint side by side on the same prompts: texts, times, tokens per forward pass.

python scripts/compare.py --ar outputs/ar --diffusion outputs/diffusion --prompts "The module" "A class" --steps 8
"""

from nanollada.scripts.decoding.comparison import main

if __name__ == "__main__":
    main()
