# Two commands do everything: `make demo` and `make test`. Each installs what is missing first.

SHELL := /bin/sh
ENV := . ./.env.sh &&
# one profile and one selection of packages for everything: llama.cpp compiles once
CARGO_FLAGS := --release --workspace --locked
FUZZ_RUNS ?= 200000
# a second build of llama.cpp (Vulkan, RPC, another clone) takes most of its objects from the first, where ccache is installed
ifneq ($(shell command -v ccache),)
export CMAKE_C_COMPILER_LAUNCHER := ccache
export CMAKE_CXX_COMPILER_LAUNCHER := ccache
endif

.PHONY: help setup python model build programs demo test lint cross floor deny test-rust test-oracles test-clients test-coreml test-swift test-vulkan bench load \
	fuzz faults schemas clean

help:
	@echo "make demo         build, fetch a small model (89 MiB), cut it in three, talk with it over two processes, compare with stock"
	@echo "make test         everything that can be tested on this machine"
	@echo "make test-vulkan  every block offloaded, through llama.cpp's Vulkan backend on a software driver (Linux)"
	@echo "make bench        the benches; each checks its answer before it is timed"
	@echo "make faults       strangers, losses and wrong files by the hundred, written into docs/TESTING.md; half an hour (Linux)"
	@echo "make schemas      the whole JSON Schema Test Suite against the server, many answers for each schema"
	@echo "make load         a crowd at the server, for ten minutes (Linux)"
	@echo "make fuzz         coverage-guided runs over the GGUF reader and the frame parser (FUZZ_RUNS=$(FUZZ_RUNS))"

setup:
	@sh .ci/setup build

# a small trained model; without it the demo takes random weights, and the tests that want it say so at the end
model:
	@sh .ci/model || :

build: setup
	$(ENV) cargo build $(CARGO_FLAGS)

# The programs as `cargo test` builds them: with the features that the tests' own dependencies ask for, so that the oracles
# do not have everything compiled a second time.
programs: setup
	$(ENV) cargo build $(CARGO_FLAGS) --bins --examples

demo: build model
	@target/release/dim-host demo

# in this order, or two beside each other (make -j2 test): what waits for a worker leaves the cores to what compiles.
# Parts that build in the same folder wait for each other, cargo sees to that.
test: lint cross test-rust test-swift fuzz deny floor test-oracles test-clients test-coreml
	@sh .ci/summary

lint: setup
	$(ENV) cargo fmt --all --check
	$(ENV) cargo clippy $(CARGO_FLAGS) --all-targets -- -D warnings
	$(ENV) RUSTDOCFLAGS="-D warnings" cargo doc $(CARGO_FLAGS) --no-deps
	@sh .ci/style
	$(ENV) sh .ci/walls
	@sh .ci/format-cpp

# the systems that this machine is not; the oldest Rust; what this takes from others, and on which terms
cross: setup
	$(ENV) sh .ci/cross/check
floor: setup
	$(ENV) sh .ci/floor
deny: setup
	$(ENV) sh .ci/deny

# dim-split alone, without a C++ compiler in sight, and then everything with it
test-rust: setup model
	$(ENV) CARGO_TARGET_DIR=target/pure cargo build --locked -p gguf-tools --no-default-features --features cli --bins
	$(ENV) cargo test $(CARGO_FLAGS)

# other people's programs on our files, and another implementation on our vectors
python: setup
	@sh .ci/setup python
test-oracles: programs model python
	.venv/bin/python docs/vectors/check.py
	.venv/bin/python tests/oracle/chat_templates.py
	.venv/bin/python gguf-tools/tests/oracle/gguf_files.py target/release
	.venv/bin/python tests/oracle/json_schema.py target/release

# other people's clients and a browser, with the server over two processes
test-clients: programs model python
	@sh .ci/setup clients
	.venv/bin/python tests/clients/run.py target/release
	.venv/bin/python tests/clients/load.py target/release 30

# a crowd at the server, for ten minutes
load: programs python
	.venv/bin/python tests/clients/load.py target/release 600

test-coreml: programs model
	@sh .ci/setup venv
	DIM_BIN=$(CURDIR)/target/release sh gguf-tools/tests/coreml/run.sh

test-swift: programs
	@sh .ci/setup venv
	@sh ios_worker/tools/test.sh

# One test at a time: ggml sets its Vulkan devices up without a lock. First as people run it, then without ggml's fusing
# of operations, where not a bit may differ.
OFFLOAD := VULKAN_SDK=$(CURDIR)/target/vulkan-sdk GGML_VK_VISIBLE_DEVICES=0 CARGO_TARGET_DIR=target/vulkan \
	cargo test --release --locked -p llama-sys-patch --features vulkan --test offload -- --test-threads 1 --nocapture
test-vulkan: programs
	@sh tests/vulkan/setup.sh
	$(ENV) $(OFFLOAD)
	$(ENV) GGML_VK_DISABLE_FUSION=1 $(OFFLOAD) stock_s_tokens sessions

bench: build
	$(ENV) cargo bench $(CARGO_FLAGS)

fuzz: setup
	$(ENV) sh gguf-tools/fuzz/run.sh $(FUZZ_RUNS)
	$(ENV) sh tests/fuzz/run.sh $(FUZZ_RUNS)
	$(ENV) DIM_REQUESTS=$$(($(FUZZ_RUNS) / 4)) cargo test $(CARGO_FLAGS) --lib request::tests

# the whole JSON Schema Test Suite against the server, and what a constraint costs: the table of docs/SERVER.md
schemas: programs model
	@sh .ci/setup python
	.venv/bin/python tests/oracle/json_schema.py target/release --all

# every way to lose a worker, every crowd at its door and wrong files, many times: the tables of docs/TESTING.md
faults: setup
	@sh .ci/faults

clean:
	rm -rf target .venv .env.sh gguf-tools/fuzz/target tests/fuzz/target tests/node_modules ios_worker/.build
