HOST = $(shell rustc -vV | sed -n 's/^host: //p')
CARGO_HOME ?= $(HOME)/.cargo
# Static: a third of a request's time is saved at start-up, and one file runs on every Linux of its architecture.
# linux_getrandom: else the crate looks for getrandom(2) by its name, which no static executable can, and opens /dev/random,
# which an empty chroot has not. Last, no path of the machine that built it gets into it.
CARGO = RUSTFLAGS='-C target-feature=+crt-static -C relocation-model=static --cfg getrandom_backend="linux_getrandom" \
	--remap-path-prefix=$(CARGO_HOME)=/cargo' cargo
# Code that a request runs, side by side.
ORDER = -C link-arg=-Wl,-T,$(CURDIR)/packaging/order.ld
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
# Where make install puts it, and below which folder it takes that place to be: for who makes packages.
prefix = /usr/local
DESTDIR =
INTO = "$(DESTDIR)$(prefix)"
PAGES = README.md CHANGELOG.md LICENSE SECURITY.md apache-example.conf docs examples
# A shell older than the Rust installation has not heard of it yet.
export PATH := $(PATH):$(HOME)/.cargo/bin
# Here, wherever the user's Rust builds else: what is built is copied from here.
export CARGO_TARGET_DIR := $(CURDIR)/target

.PHONY: build demo test bench order man install uninstall dist clean rust

build: rust
	@# Not for all that is built: what changes with it is the last step alone.
	$(CARGO) rustc --release --locked --target $(HOST) --bin shortbus -- $(ORDER)
	@# By rename: a copy that is running cannot be written to.
	cp target/$(HOST)/release/shortbus cgi-bin/.shortbus.new && mv -f cgi-bin/.shortbus.new cgi-bin/shortbus

demo: NEEDS = apache2 curl
demo: build
	@tests/demo.sh

test: NEEDS = memcached apache2 mod_fcgid mod_evasive nginx fcgiwrap lighttpd caddy busybox uwsgi-core spawn-fcgi systemd-socket-activate curl openssl ip strace python3 php dpkg-deb lintian man chromium firefox-esr node npm
test: build
	cargo test --locked

bench: NEEDS = memcached apache2 nginx fcgiwrap valgrind strace node
bench: build
	@# What it compares with.
	$(CARGO) rustc --release --locked --target $(HOST) --package baseline --bin fixed -- $(ORDER)
	cp target/$(HOST)/release/fixed target/$(HOST)/release/fixed-laid-out
	$(CARGO) build --release --locked --target $(HOST) --package baseline
	$(CARGO) bench --locked --target $(HOST)

# Where the linker puts what a request runs. After larger changes, or with another compiler; `make bench` shows its worth.
order: NEEDS = valgrind memcached
order: rust
	CARGO_PROFILE_RELEASE_STRIP=none $(CARGO) rustc --release --locked --target $(HOST) --target-dir target/order \
		--bin shortbus -- -C link-arg=-Wl,-Map=$(CURDIR)/target/order/map
	packaging/order.sh target/order/$(HOST)/release/shortbus target/order/map >target/order.ld
	mv target/order.ld packaging/order.ld && touch src/main.rs

# The manual page, of what people read elsewhere too; a test compares.
man:
	@awk -v version=$(VERSION) -f packaging/man.awk src/help.txt title=Examples section='From a terminal' README.md \
		title=Environment section= docs/settings.md title=Errors section=Errors docs/http.md

# Not built here: root often has no Rust.
install:
	@test -x cgi-bin/shortbus || { echo "Nothing to install yet: run make first." >&2; exit 1; }
	install -d $(INTO)/bin $(INTO)/share/man/man1 $(INTO)/share/doc/shortbus $(INTO)/lib/systemd/system
	@# By rename: a process that runs keeps its file, and none ever starts half of one.
	install -m 755 cgi-bin/shortbus $(INTO)/bin/.shortbus.new && mv -f $(INTO)/bin/.shortbus.new $(INTO)/bin/shortbus
	install -m 644 docs/shortbus.1 $(INTO)/share/man/man1
	cp -R $(PAGES) $(INTO)/share/doc/shortbus
	for unit in shortbus.service shortbus.socket; do \
		sed 's|/usr/local/bin|$(prefix)/bin|' examples/systemd/$$unit >$(INTO)/lib/systemd/system/$$unit || exit; done

uninstall:
	rm -f $(INTO)/bin/shortbus $(INTO)/share/man/man1/shortbus.1 $(INTO)/lib/systemd/system/shortbus.service \
		$(INTO)/lib/systemd/system/shortbus.socket
	rm -rf $(INTO)/share/doc/shortbus

# What people download: the same bytes wherever it is built, by the same Rust and C library.
dist: NEEDS = dpkg-deb
dist: build
	packaging/dist.sh $(VERSION) $(HOST) $(PAGES)

clean:
	cargo clean
	rm -rf cgi-bin/shortbus dist

rust:
	@command -v cargo >/dev/null || { echo "shortbus is built with Rust: install it from https://rustup.rs and run make again." >&2; exit 1; }
	@tests/needs.sh cc $(NEEDS)
