HOST = $(shell rustc -vV | sed -n 's/^host: //p')
# Static: a third of a request's time is saved at start-up, and one file runs on every Linux of its architecture.
CARGO = RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static" cargo
CGIBIN = /usr/lib/cgi-bin
NAME = chat
# A shell older than the Rust installation has not heard of it yet.
export PATH := $(PATH):$(HOME)/.cargo/bin
# Here, wherever the user's Rust builds else: what is built is copied from here.
export CARGO_TARGET_DIR := $(CURDIR)/target

.PHONY: build demo test bench install clean rust

build: rust
	$(CARGO) build --release --locked --target $(HOST)
	@# By rename: a copy that is running cannot be written to.
	cp target/$(HOST)/release/shortbus cgi-bin/.shortbus.new && mv -f cgi-bin/.shortbus.new cgi-bin/shortbus

demo: NEEDS = apache2 curl
demo: build
	@tests/demo.sh

test: NEEDS = memcached apache2 mod_fcgid mod_evasive nginx fcgiwrap lighttpd spawn-fcgi systemd-socket-activate curl openssl ip python3 php chromium firefox-esr node npm
test: build
	cargo test --locked

bench: NEEDS = memcached apache2 nginx fcgiwrap valgrind strace node
bench: build
	@# What it compares with.
	$(CARGO) build --release --locked --target $(HOST) --package baseline
	$(CARGO) bench --locked --target $(HOST)

# Not built here: root often has no Rust.
install:
	@test -x cgi-bin/shortbus || { echo "Nothing to install yet: run make first." >&2; exit 1; }
	install -d "$(DESTDIR)$(CGIBIN)"
	install -m 755 cgi-bin/shortbus "$(DESTDIR)$(CGIBIN)/.$(NAME).new"
	mv -f "$(DESTDIR)$(CGIBIN)/.$(NAME).new" "$(DESTDIR)$(CGIBIN)/$(NAME)"

clean:
	cargo clean
	rm -f cgi-bin/shortbus

rust:
	@command -v cargo >/dev/null || { echo "shortbus is built with Rust: install it from https://rustup.rs and run make again." >&2; exit 1; }
	@tests/needs.sh cc $(NEEDS)
