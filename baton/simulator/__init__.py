"""The cluster in virtual time: the product's own controller core, scheduler and block manager."""
