"""Run `tatar_dist.demo.tiny.build` under its former name, for one release."""

from tatar_dist.demo.tiny.build import main

if __name__ == "__main__":
    main()
