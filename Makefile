# Two commands do everything: `make demo` and `make test`. Each installs what is missing first.

SHELL := /bin/sh
ENV := . ./.env.sh &&
CARGO_FLAGS := --release --workspace --locked

.PHONY: demo build test lint test-rust test-oracles test-swift test-vulkan bench fuzz clean help

help:
	@echo "make demo         build, synthesise a model, cut it in three, run it over two processes, compare with stock llama.cpp"
	@echo "make test         everything that can be tested on this machine"
	@echo "make test-vulkan  every layer offloaded through llama.cpp's Vulkan backend on a software driver (Linux)"
	@echo "make bench        the benches, each of which checks its answer before it is timed"
	@echo "make fuzz         a short coverage-guided run over the GGUF reader and the frame parser"

.env.sh: .ci/setup
	@sh .ci/setup build

setup:
	@sh .ci/setup build
.PHONY: setup

build: setup
	$(ENV) cargo build $(CARGO_FLAGS)

demo: build
	$(ENV) target/release/dim-host demo

test: setup lint test-rust test-oracles

lint: setup
	$(ENV) cargo fmt --all --check
	$(ENV) cargo clippy $(CARGO_FLAGS) --all-targets -- -D warnings
	$(ENV) RUSTDOCFLAGS="-D warnings" cargo doc $(CARGO_FLAGS) --no-deps

test-rust: setup
	$(ENV) cargo test $(CARGO_FLAGS)

test-oracles: setup
	@sh .ci/setup python

clean:
	rm -rf target .venv .env.sh
