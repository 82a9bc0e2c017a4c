HOST := $(shell rustc -vV | sed -n 's/^host: //p')
build:
	RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static" cargo build --release --locked --target $(HOST)
	cp target/$(HOST)/release/shortbus cgi-bin/shortbus
