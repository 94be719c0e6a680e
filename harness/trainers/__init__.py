"""Training inside the harness: iSFT and GRPO on rows of whole rollouts, with text or with slots behind them."""
