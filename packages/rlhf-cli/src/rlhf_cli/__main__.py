"""`python -m rlhf_cli` (and `torchrun -m rlhf_cli`, `deepspeed --module rlhf_cli`) is `rlhf`."""

from rlhf_cli.main import main

if __name__ == "__main__":
    main()
