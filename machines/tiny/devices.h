/* The hardware that the tiny guest uses, apart from the screen. */
#ifndef DEVICES_H
#define DEVICES_H

#include "io.h"

/* PCI, configuration mechanism #1. Finds a device on bus 0 by vendor (low half) and device id (high half). */
u32 pci_read(u32 device, u32 reg);
int pci_find(u32 id, u32 *device);

/* PS/2 controller: empties its queues and lets the mouse raise IRQ 12, which qemu also does for the vmmouse port. */
void ps2_start(void);

/* Next byte of the keyboard (scan code set 1), or -1 when there is none. Bytes of the PS/2 mouse are dropped. */
int keyboard_read(void);

struct pointer {
    u32 x, y;       /* 0..65535 over the whole screen */
    u32 buttons;
};
#define BUTTON_LEFT 0x20

/* The absolute pointer of the vmmouse port. The read answers 0 when nothing happened since the last one. */
void vmmouse_start(void);
int vmmouse_read(struct pointer *pointer);

/* Copies a fw_cfg file, at most size - 1 bytes, zeros behind it; answers its length, 0 when there is no such file. */
u32 fw_cfg_read(const char *name, char *to, u32 size);

/* ACPI power management registers: power button (QMP system_powerdown), power off (state S5). */
void power_start(void);
int power_button_pressed(void);
void power_off(void);

/* Resets the machine through the keyboard controller, as Ctrl+Alt+Delete does on a PC. */
void power_reset(void);

#endif
