"""Run `tatar_dist.demo.tiny.pretrain` under its former name, for one release."""

from tatar_dist.demo.tiny.pretrain import main

if __name__ == "__main__":
    main()
